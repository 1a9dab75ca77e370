"""ViLT cases of other sizes, tasks and options than the golden ones, made here by a plain second implementation on torch alone."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.parity.harness import run

VOCABULARY, ANSWERS, PATCH, GRID = 50, 7, 6, 5  # the table is of GRID x GRID patches
OPTIONS = {
    "image_size": PATCH * GRID,
    "patch_size": PATCH,
    "vocab_size": VOCABULARY,
    "max_text_len": 9,
    "drop_rate": 0.1,
}
OPTIONS |= {"hidden_size": 24, "num_heads": 3, "num_layers": 3, "mlp_ratio": 2, "vqav2_label_size": ANSWERS}
OPTIONS |= {
    "optim_type": "adamw",
    "learning_rate": 2e-3,
    "weight_decay": 0.02,
    "decay_power": 1,
    "end_lr": 0,
    "lr_mult": 5,
}
TASKS = ("mlm", "mpp", "itm", "vqa", "nlvr2", "irtr")
UNDECAYED = ("bias", "LayerNorm.bias", "LayerNorm.weight", "norm.bias", "norm.weight")
UNDECAYED += ("norm1.bias", "norm1.weight", "norm2.bias", "norm2.weight")


def switches(**values: float) -> dict[str, float]:
    return {name: values.get(name, 0) for name in TASKS}


def shapes(loss_names: dict[str, float]) -> dict[str, tuple[int, ...]]:
    """Of every tensor, in the order of a state dict."""
    width, hidden = OPTIONS["hidden_size"], OPTIONS["hidden_size"] * OPTIONS["mlp_ratio"]
    made: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True):
        made[f"{name}.weight"] = (rows, columns)
        if bias:
            made[f"{name}.bias"] = (rows,)

    def norm(name: str, size: int = width):
        made[f"{name}.weight"] = made[f"{name}.bias"] = (size,)

    tables = {"word": VOCABULARY, "position": OPTIONS["max_text_len"], "token_type": 2}
    made |= {f"text_embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()}
    norm("text_embeddings.LayerNorm")
    made["token_type_embeddings.weight"] = (3 if loss_names["nlvr2"] > 0 else 2, width)
    made["transformer.cls_token"], made["transformer.pos_embed"] = (1, 1, width), (1, 1 + GRID * GRID, width)
    if loss_names["mpp"] > 0:
        made["transformer.mask_token"] = (1, 1, width)
    made["transformer.patch_embed.proj.weight"] = (width, 3, PATCH, PATCH)
    made["transformer.patch_embed.proj.bias"] = (width,)
    for block in (f"transformer.blocks.{number}" for number in range(OPTIONS["num_layers"])):
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", hidden, width)
        linear(f"{block}.mlp.fc2", width, hidden)
    norm("transformer.norm")
    linear("pooler.dense", width, width)
    for head, classes in (("mlm", VOCABULARY), ("mpp", 768)):
        if loss_names[head] > 0:
            linear(f"{head}_score.transform.dense", width, width)
            norm(f"{head}_score.transform.LayerNorm")
            linear(f"{head}_score.decoder", classes, width, bias=head == "mpp")
    if loss_names["mlm"] > 0:
        made["mlm_score.bias"] = (VOCABULARY,)
    if loss_names["itm"] > 0:
        linear("itm_score.fc", 2, width)
    for task, images, classes in (("vqa", 1, ANSWERS), ("nlvr2", 2, 2)):
        if loss_names[task] > 0:
            linear(f"{task}_classifier.0", 2 * width, images * width)
            norm(f"{task}_classifier.1", 2 * width)
            linear(f"{task}_classifier.3", classes, 2 * width)
    if loss_names["irtr"] > 0:
        linear("rank_output", 1, width)
    return made


class Original:
    """The released model by its formulas: weights under their names, tasks by `loss_names`, and a batch that serves all of them."""

    def __init__(self, loss_names: dict[str, float], limit: int = -1, false_texts: int = 0, rows: int = 3):
        self.draw = torch.Generator().manual_seed(7)
        self.loss_names, self.limit = loss_names, limit
        self.weights = {}
        for name, shape in shapes(loss_names).items():
            value = 0.25 * torch.randn(shape, generator=self.draw) / (2 if "fc2" in name else 1)
            one = len(shape) == 1 and name.endswith("weight")
            frozen = name.startswith("itm_score") and loss_names["irtr"] > 0
            self.weights[name] = (value + 1 if one else value).requires_grad_(not frozen)
        self.inputs, self.outputs, self.first = self.batch(rows, false_texts), {}, None

    def batch(self, rows: int, false_texts: int) -> dict[str, torch.Tensor]:
        ids, masks = self.texts([2, 8, 5, 8][:rows])
        ids_mlm, labels_mlm = ids.clone(), torch.full_like(ids, -100)
        labels_mlm[1, 2:5], ids_mlm[1, 2:4] = ids[1, 2:5], 3
        # one row of patches, one column, as large as the canvas
        sizes = [(1, 7), (6, 1), (6, 7), (3, 4)][:rows]
        made = {"text_ids": ids, "text_masks": masks, "text_ids_mlm": ids_mlm, "text_labels_mlm": labels_mlm}
        made |= {"image": self.pictures(sizes), "false_image_0": self.pictures(sizes[1:] + sizes[:1])}
        made["itm_labels"] = torch.tensor([0, 1, 0, 1][:rows])
        made |= {
            "image_0": self.pictures(sizes[::-1]),
            "image_1": self.pictures([(2, 5), (4, 1), (3, 4), (1, 1)][:rows], (4, 5)),
        }
        made["answers"] = torch.tensor([1, 0, 1, 1][:rows])
        made["vqa_labels"] = torch.tensor([[-1, -1, -1], [6, 0, 6], [3, -1, -1], [1, 2, -1]][:rows])
        made["vqa_scores"] = torch.tensor([[0, 0, 0], [0.3, 1.0, 0.9], [0.6, 0, 0], [1.0, 0.3, 0]][:rows])
        chances = (0.5, 0.7)
        shape = (rows, 6 * 7)
        made["mpp_masked_indices"], made["mpp_replace_draw"] = (
            (torch.rand(shape, generator=self.draw) < chance).long() for chance in chances
        )
        for number in range(false_texts):
            false_ids, false_masks = self.texts([8, 3, 6, 2][:rows])
            made |= {f"false_text_{number}_ids": false_ids, f"false_text_{number}_masks": false_masks}
        return made

    def texts(self, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(4, VOCABULARY, (len(lengths), max(lengths)), generator=self.draw)
        masks = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        return ids * masks, masks

    def pictures(self, sizes: list[tuple[int, int]], canvas: tuple[int, int] = (6, 7)) -> torch.Tensor:
        """Of eight bits, of so many patches, zero-padded to a canvas."""
        height, width = (PATCH * side for side in canvas)
        made = torch.zeros(len(sizes), 3, height, width)
        for row, (h, w) in enumerate(sizes):
            colours = torch.randint(0, 256, (3, PATCH * h, PATCH * w), generator=self.draw)
            made[row, :, : PATCH * h, : PATCH * w] = (colours / 255 - 0.5) / 0.5
        return made

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        spread = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return spread * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def visual_embed(self, name: str, pixels: torch.Tensor, masked: bool = False):
        """Embedded patches of a random selection, their mask, their places and the labels of masked ones."""
        weight, bias = (self.weights[f"transformer.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        x = F.conv2d(pixels, weight, bias, stride=PATCH)
        self.outputs[f"{name}.patch_projection"] = x
        rows, _, height, width = x.shape
        seen = F.interpolate((pixels.sum(1, keepdim=True) != 0).float(), size=(height, width))[:, 0].long()
        table = self.weights["transformer.pos_embed"][0, 1:].T.reshape(1, -1, GRID, GRID)
        places = []
        for row in range(rows):
            h, w = int(seen[row, :, 0].sum()), int(seen[row, 0].sum())
            grid = F.interpolate(table, size=(h, w), mode="bilinear", align_corners=True)[0]
            if self.first in (None, name):
                self.outputs[f"pos_embed_interpolated_image{row}"], self.first = grid, name
            places.append(F.pad(grid, (0, width - w, 0, height - h)))
        x, places = x.flatten(2).transpose(1, 2), torch.stack(places).flatten(2).transpose(1, 2)
        labels = torch.full((rows, height * width, 3), -100)
        if masked:
            chosen, hidden = self.inputs["mpp_masked_indices"].bool(), self.inputs["mpp_replace_draw"].bool()
            box = torch.ones(3, 1, PATCH, PATCH) / PATCH**2
            colours = (
                F.conv2d(pixels * 0.5 + 0.5, box, stride=PATCH, groups=3).mul(255).long().flatten(2).transpose(1, 2)
            )
            labels[chosen] = colours[chosen]
            x = torch.where((chosen & hidden)[..., None], self.weights["transformer.mask_token"], x)
        flat = seen.flatten(1)
        count = int(flat.sum(1).max())
        count = count if self.limit < 0 else min(count, self.limit)
        chosen = []
        for row in range(rows):
            real, padding = flat[row].nonzero()[:, 0], (flat[row] == 0).nonzero()[:, 0]
            if len(real) >= count:
                chosen.append(real[torch.randperm(len(real), generator=self.draw)[:count]])
            else:
                fillers = torch.randint(len(padding), (count - len(real),), generator=self.draw)
                chosen.append(torch.cat([real, padding[fillers]]))
        select = torch.stack(chosen)
        self.inputs[f"{name}.patch_select"] = select
        row = torch.arange(rows)[:, None]
        x, places, mask, labels = x[row, select], places[row, select], flat[row, select], labels[row, select]
        labels[mask == 0] = -100
        front = self.weights["transformer.cls_token"] + self.weights["transformer.pos_embed"][:, :1]
        x = torch.cat([front.expand(rows, -1, -1), x + places], dim=1)
        self.outputs[f"{name}.patch_index"] = torch.stack([select // width, select % width], dim=-1)
        self.outputs[f"{name}.patch_grid"] = torch.tensor([height, width])
        return x, F.pad(mask, (1, 0), value=1), F.pad(labels, (0, 0, 1, 0), value=-100)

    def infer(self, name: str, ids, masks, pixels, modality: int = 1, masked: bool = False):
        words, places, kinds = (
            self.weights[f"text_embeddings.{table}_embeddings.weight"] for table in ("word", "position", "token_type")
        )
        length, heads = ids.shape[1], OPTIONS["num_heads"]
        text = self.norm("text_embeddings.LayerNorm", words[ids] + kinds[0] + places[:length], 1e-12)
        image, image_masks, labels = self.visual_embed(name, pixels, masked)
        kept = {"text_embeddings": text, "image_masks": image_masks, "co_masks": torch.cat([masks, image_masks], dim=1)}
        modalities = self.weights["token_type_embeddings.weight"]
        x = torch.cat([text + modalities[0], image + modalities[modality]], dim=1)
        kept["embeddings"] = x
        for number in range(OPTIONS["num_layers"]):
            block = f"transformer.blocks.{number}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(kept["co_masks"][:, None, None] == 0, -math.inf)
            x = x + self.linear(f"{block}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
            kept[f"layer_{number}"] = x
        x = kept["final_norm"] = self.norm("transformer.norm", x, 1e-6)
        kept["raw_cls_feats"] = x[:, 0]
        kept["pooled"] = kept["cls_feats"] = self.linear("pooler.dense", x[:, 0]).tanh()
        self.outputs |= {f"{name}.{key}": value for key, value in kept.items()}
        return x[:, :length], x[:, length:], kept["cls_feats"], image_masks, labels

    def transformed(self, head: str, states: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.linear(f"{head}.transform.dense", states))
        return self.linear(f"{head}.decoder", self.norm(f"{head}.transform.LayerNorm", hidden, 1e-12))

    def classified(self, head: str, pooled: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{head}.3", F.gelu(self.norm(f"{head}.1", self.linear(f"{head}.0", pooled), 1e-5)))

    def losses(self) -> dict[str, torch.Tensor]:
        """Of every task whose switch is 1 or more, in the released order."""
        words = self.inputs["text_ids"], self.inputs["text_masks"]
        found = {}
        for task in TASKS:
            if self.loss_names[task] >= 1:
                found |= getattr(self, task)(*words, self.inputs["image"])
        return found

    def mlm(self, ids, masks, pixels):
        ids, labels = self.inputs["text_ids_mlm"], self.inputs["text_labels_mlm"]
        states, *_ = self.infer("mlm", ids, masks, pixels)
        logits = self.transformed("mlm_score", states) + self.weights["mlm_score.bias"]
        self.outputs |= {"mlm_logits": logits, "mlm_labels": labels, "mlm_ids": ids}
        return {"mlm_loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)}

    def mpp(self, ids, masks, pixels):
        _, states, _, _, labels = self.infer("mpp", ids, masks, pixels, masked=True)
        logits = self.transformed("mpp_score", states).unflatten(-1, (3, 256))
        self.outputs |= {"mpp_logits": logits, "mpp_labels": labels, "mpp.image_labels": labels}
        return {"mpp_loss": F.cross_entropy(logits.flatten(0, 2), labels.flatten(), ignore_index=-100)}

    def itm(self, ids, masks, pixels):
        labels = self.inputs["itm_labels"]
        pixels = torch.stack([pair[1 - label] for *pair, label in zip(pixels, self.inputs["false_image_0"], labels)])
        text, image, pooled, image_masks, _ = self.infer("itm", ids, masks, pixels)
        logits = self.linear("itm_score.fc", pooled)
        text_pad, image_pad = masks == 0, image_masks == 0
        text_pad[:, 0] = image_pad[:, 0] = True
        text_pad[torch.arange(len(ids)), masks.sum(1) - 1] = True
        cost = 1 - F.normalize(text, dim=-1, eps=1e-5) @ F.normalize(image, dim=-1, eps=1e-5).transpose(1, 2)
        joint = text_pad[:, :, None] | image_pad[:, None]
        cost = cost.masked_fill(joint, 0)
        plan = self.ipot(cost.detach(), joint, text_pad, image_pad)
        distance = (cost @ plan).diagonal(dim1=1, dim2=2).sum(1)
        self.outputs |= {"itm_logits": logits, "itm_labels": labels.float(), "wpa_cost": cost, "wpa_plan": plan}
        self.outputs |= {"wpa_txt_pad": text_pad.long(), "wpa_img_pad": image_pad.long(), "wpa_distance": distance}
        apart = (distance[labels == 1].sum() - distance[labels == 0].sum()) / len(labels)
        return {"itm_loss": F.cross_entropy(logits, labels), "itm_wpa_loss": 0.1 * apart}

    @staticmethod
    def ipot(cost, joint, text_pad, image_pad):
        joint = joint.transpose(1, 2)
        x_len, y_len = ((~pad).sum(1).float()[:, None] for pad in (text_pad, image_pad))
        sigma = (1 / x_len).expand(text_pad.shape).masked_fill(text_pad, 0)
        plan, kernel = torch.ones(joint.shape), (-cost.transpose(1, 2) / 0.5).exp()
        plan, kernel = plan.masked_fill(joint, 0), kernel.masked_fill(joint, 0)
        for _ in range(50):
            q = kernel * plan
            delta = 1 / (y_len * (q @ sigma[..., None])[..., 0] + 1e4 * image_pad)
            sigma = 1 / (x_len * (delta[:, None] @ q)[:, 0] + 1e4 * text_pad)
            plan = delta[..., None] * q * sigma[:, None]
        return plan.masked_fill(joint, 0)

    def vqa(self, ids, masks, pixels):
        logits = self.classified("vqa_classifier", self.infer("vqa", ids, masks, pixels)[2])
        targets = torch.zeros(len(ids), ANSWERS)
        for row, (answers, scores) in enumerate(zip(self.inputs["vqa_labels"], self.inputs["vqa_scores"])):
            for answer, score in zip(answers, scores):
                if answer >= 0:
                    targets[row, answer] = score
        self.outputs |= {"vqa_logits": logits, "vqa_targets": targets}
        return {"vqa_loss": F.binary_cross_entropy_with_logits(logits, targets) * ANSWERS}

    def nlvr2(self, ids, masks, pixels):
        pooled = [
            self.infer(f"nlvr2_image{image}", ids, masks, self.inputs[f"image_{image}"], 1 + image)[2]
            for image in (0, 1)
        ]
        logits, labels = self.classified("nlvr2_classifier", torch.cat(pooled, dim=1)), self.inputs["answers"]
        self.outputs |= {"nlvr2_logits": logits, "nlvr2_labels": labels}
        return {"nlvr2_loss": F.cross_entropy(logits, labels)}

    def irtr(self, ids, masks, pixels):
        false = [name[:-4] for name in self.inputs if name.startswith("false_text_") and name.endswith("_ids")]
        texts, their_masks = (
            torch.stack([own, *(self.inputs[f"{name}_{kind}"] for name in false)], dim=1)
            for own, kind in ((ids, "ids"), (masks, "masks"))
        )
        rows = pixels.repeat_interleave(1 + len(false), dim=0)
        pooled = self.infer("irtr", texts.flatten(0, 1), their_masks.flatten(0, 1), rows)[2]
        scores = self.linear("rank_output", pooled).view(len(ids), -1)
        return {"irtr_loss": F.cross_entropy(scores, torch.zeros(len(ids), dtype=torch.long))}

    def write(self, folder, name: str = "checkpoint.ckpt", bare: bool = False, **options) -> None:
        state = {key: value.detach().clone() for key, value in self.weights.items()}
        state["text_embeddings.position_ids"] = torch.arange(OPTIONS["max_text_len"])[None]
        settings = OPTIONS | {"loss_names": self.loss_names, "max_image_len": self.limit, **options}
        wrapped = {"epoch": 1, "state_dict": state, "hyper_parameters": {"config": settings}}
        torch.save(state if bare else wrapped, folder / name)
        save_file({key: value.contiguous() for key, value in self.inputs.items()}, folder / "inputs.safetensors")
        outputs = {
            key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in self.outputs.items()
        }
        save_file(outputs, folder / "outputs.safetensors")
        (folder / "config.json").write_text(json.dumps(settings))

    def write_tasks(self, folder, **how) -> None:
        losses = self.losses()
        sections = {**losses, "total_loss": sum(losses.values())}
        self.outputs |= sections
        trained = [name for name, value in self.weights.items() if value.requires_grad]
        norms = {}
        for section, loss in sections.items():
            found = torch.autograd.grad(
                loss, [self.weights[name] for name in trained], retain_graph=True, allow_unused=True
            )
            norms[section] = dict.fromkeys(self.weights)
            norms[section] |= {name: None if g is None else g.norm().item() for name, g in zip(trained, found)}
        self.write(folder, **how)
        (folder / "grads.json").write_text(json.dumps(norms))


def failures(case) -> list[str]:
    return [str(line) for line in case.lines if line.verdict == "FAIL"]


CASES = {
    "itm alone, whose first images are false ones": ("pretrain_mlm_itm", {"itm": 1}, {}),
    "three objectives, few patches": ("pretrain_mpp", {"itm": 1, "mlm": 1, "mpp": 1}, {"limit": 5}),
    "two patches each": ("pretrain_mpp", {"mpp": 1}, {"limit": 2}),
    "a limit that nothing reaches": ("pretrain_mlm_itm", {"mlm": 1, "itm": 0.5}, {"limit": 100, "rows": 4}),
    "answers and words": ("vqa", {"vqa": 2, "mlm": 1}, {"limit": 9}),
    "two images, few patches, and words": ("nlvr2", {"nlvr2": 1, "mlm": 1, "vqa": 0.5}, {"limit": 4}),
    "two images and matching": ("nlvr2", {"itm": 1, "nlvr2": 1}, {}),
    "one false text, few patches": ("irtr", {"itm": 0.5, "irtr": 1}, {"limit": 3, "false_texts": 1}),
    "retrieval with a frozen matching head": ("irtr", {"itm": 1, "irtr": 1, "mlm": 1}, {"false_texts": 4}),
    "answers, two images and retrieval": ("irtr", {"irtr": 1, "itm": 0.5, "nlvr2": 1, "vqa": 1}, {"false_texts": 2}),
}


@pytest.mark.parametrize("title", CASES)
def test_other_tasks_and_sizes(title, tmp_path):
    kind, tasks, options = CASES[title]
    Original(switches(**tasks), **options).write_tasks(tmp_path)
    case = run("vilt", kind, tmp_path)
    assert not failures(case)
    assert sum(line.verdict == "ok" for line in case.lines) > 60


def test_one_pass_of_a_bare_file(tmp_path):
    original = Original(switches(mlm=1, itm=0.5, vqa=1, nlvr2=1, mpp=0.5, irtr=0.5), limit=6)
    original.infer("infer", original.inputs["text_ids"], original.inputs["text_masks"], original.inputs["image"])
    original.write(tmp_path, name="checkpoint.pth", bare=True)
    original.write(tmp_path, name="pytorch_model_9.bin")
    case = run("vilt", "patch_sampling", tmp_path)
    assert not failures(case)
    assert sum(line.verdict == "ok" for line in case.lines) == 2 * 17
    original.inputs["infer.patch_select"] = original.inputs["infer.patch_select"].flip(1)
    original.write(tmp_path, bare=True)
    failed = {
        line.name.split(": ")[-1] for line in run("vilt", "patch_sampling", tmp_path).lines if line.verdict == "FAIL"
    }
    assert {"infer.patch_index", "infer.final_norm"} <= failed  # patches elsewhere, and what is pooled stays
    assert not {"infer.pooled", "infer.text_embeddings", "infer.patch_projection"} & failed


@pytest.mark.parametrize(
    ("options", "wrong", "right"),
    [
        ({"num_heads": 2}, {"mlm.layer_0", "itm_logits"}, {"mlm.embeddings"}),
        ({"loss_names": switches(itm=0.5, mlm=1)}, {"itm_logits", "itm_loss", "total_loss"}, {"mlm_loss"}),
    ],
)
def test_options_are_heeded(options, wrong, right, tmp_path):
    Original(switches(itm=1, mlm=1)).write_tasks(tmp_path, **options)
    verdicts = {line.name: line.verdict for line in run("vilt", "pretrain_mlm_itm", tmp_path).lines}
    assert all(verdicts[name] == "FAIL" for name in wrong) and all(verdicts[name] == "ok" for name in right)


def factor_of(step: int, total: int, warmup: int, options: dict) -> float:
    """On the rate of one group, of which `end_lr` stands in proportion to the rate of the whole."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / (total - warmup)
    if options["decay_power"] == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    end = options["end_lr"] / options["learning_rate"]
    return end + (1 - end) * (1 - min(progress, 1.0)) ** options["decay_power"]


def write_updates(folder, original: Original, trainer: dict, warmup: int | float, updates: int = 5, **changes) -> None:
    options = OPTIONS | {"_trainer": trainer, "warmup_steps": warmup, **changes}
    total = trainer["max_steps"] or trainer["n_batches"] * trainer["max_epochs"] // trainer["acc"]
    steps = int(total * warmup) if isinstance(warmup, float) else warmup
    lr, groups = options["learning_rate"], []
    for head in (False, True):
        for decay in (options["weight_decay"], 0.0):
            fitting = [
                name
                for name in original.weights
                if any(part in name for part in UNDECAYED) == (not decay)
                and any(part in name for part in ("vqa_classifier", "nlvr2_classifier")) == head
            ]
            rate = lr * options["lr_mult"] if head else lr
            groups.append({"weight_decay": decay, "base_lr": rate, "params": fitting})
    factors = {step: factor_of(step, total, steps, options) for step in (*range(updates), total - 1, total + 3)}
    rates = {str(step): [group["base_lr"] * factor for group in groups] for step, factor in factors.items()}
    expected = {"groups": groups, "lr_by_step": rates, "total_steps": total, "warmup_steps": steps}
    moved = [n for n, w in original.weights.items() if w.requires_grad and "pos_embed" not in n]
    values = {name: original.weights[name].detach().clone() for name in moved}
    original.inputs, original.outputs = {}, {}
    means, squares = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))
    others = {"adam": (torch.optim.Adam, {}), "sgd": (torch.optim.SGD, {"momentum": 0.9})}
    other = None
    if options["optim_type"] in others:
        kind, numbers = others[options["optim_type"]]
        parts = [
            {"params": [values[n] for n in g["params"] if n in values]} | {"weight_decay": g["weight_decay"]}
            for g in groups
        ]
        other = kind(parts, lr=1.0, **numbers)
    for step in range(updates):
        for name, value in values.items():
            value.grad = 10.0 ** -(1 + 5 * (step % 2)) * torch.randn(value.shape, generator=original.draw)
            original.inputs[f"grad.{step}.{name}"] = value.grad
        for number, group in enumerate(groups):
            rate = group["base_lr"] * factors[step]
            if other is not None:
                other.param_groups[number]["lr"] = rate
                continue
            for name in [name for name in group["params"] if name in values]:
                value, gradient = values[name], values[name].grad
                means[name].mul_(0.9).add_(gradient, alpha=1 - 0.9)
                squares[name].mul_(0.98).addcmul_(gradient, gradient, value=1 - 0.98)
                size = rate * math.sqrt(1 - 0.98 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                value.addcdiv_(means[name], squares[name].sqrt() + 1e-8, value=-size)
                value.add_(value, alpha=-rate * group["weight_decay"])
        if other is not None:
            other.step()
        if step % 2 == 0:
            original.outputs |= {f"after_step{step}.{name}": value.clone() for name, value in values.items()}
    original.write(folder, **{name: value for name, value in options.items() if name not in OPTIONS or name in changes})
    (folder / "expected.json").write_text(json.dumps(expected))


EPOCHS = {"max_steps": None, "max_epochs": 3, "acc": 4, "n_batches": 11}
UPDATES = {
    "two images, a curved end above 0": ({"nlvr2": 1}, EPOCHS, 2, {"decay_power": 2, "end_lr": 2e-4}),
    "retrieval, half a wave that rises again": (
        {"irtr": 1, "itm": 0.5},
        {"max_steps": 3, "max_epochs": 9, "acc": 1, "n_batches": 50},
        0,
        {"decay_power": "cosine", "end_lr": 1e-3, "lr_mult": 1},
    ),
    "pre-training": ({"mlm": 1, "itm": 1, "mpp": 1}, EPOCHS | {"max_steps": 20}, 0.13, {"decay_power": 0.5}),
    "several heads": ({"vqa": 1, "mlm": 1, "nlvr2": 0.5, "irtr": 0.5, "itm": 0.5}, EPOCHS, 0.3, {"weight_decay": 0.1}),
    "Adam": ({"vqa": 1}, EPOCHS, 1, {"optim_type": "adam", "end_lr": 1e-3}),
    "SGD": ({"mlm": 1}, EPOCHS, 0.2, {"optim_type": "sgd", "learning_rate": 0.1}),
}


@pytest.mark.parametrize("title", UPDATES)
def test_updates_of_other_tasks(title, tmp_path):
    tasks, trainer, warmup, options = UPDATES[title]
    original = Original(switches(**tasks))
    write_updates(tmp_path, original, trainer, warmup, **options)
    case = run("vilt", "optimizer_vqa", tmp_path)
    assert not failures(case)
    assert sum(line.verdict == "ok" for line in case.lines) > 3 * 50
    stated = json.loads((tmp_path / "config.json").read_text())
    stated |= {"weight_decay": 0.3, "lr_mult": 3}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    failed = {line.name for line in run("vilt", "optimizer_vqa", tmp_path).lines if line.verdict == "FAIL"}
    assert "expected.json: groups" in failed and "after_step4.pooler.dense.weight" in failed
    assert "expected.json: total_steps" not in failed
