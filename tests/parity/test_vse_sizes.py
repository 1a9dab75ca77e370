"""VSE-infinity cases of other sizes and options than the golden ones, made here by a plain second implementation on torch's GRU."""

import argparse
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import BertConfig, BertModel

from conversion.from_vse import read_original
from tests.parity.harness import run

OPTIONS = {"margin": 0.3, "embed_size": 24, "max_violation": True, "no_txtnorm": False, "grad_clip": 2.0}
OPTIONS |= {"learning_rate": 5e-4, "optim": "adam", "backbone_lr_factor": 0.01, "input_scale_factor": 1.5}
BERT = {"vocab_size": 40, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
BERT |= {"max_position_embeddings": 20, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TRAINED_BERT, TRAINED_CNN = 0.1, 0.01  # factors on the rate


def both_ways(gru: nn.GRU, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    states, _ = pad_packed_sequence(gru(packed)[0], batch_first=True)
    return (states[..., : gru.hidden_size] + states[..., gru.hidden_size :]) / 2


class Pooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.linear = nn.GRU(32, 32, bidirectional=True, batch_first=True), nn.Linear(32, 1, bias=False)

    def forward(self, features, lengths):
        longest = int(lengths.max())
        angles = torch.arange(longest)[:, None] * torch.exp(torch.arange(0, 32, 2) * (-math.log(10000.0) / 32))
        code = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).repeat(len(lengths), 1, 1)
        beyond = torch.arange(longest)[None] >= lengths[:, None]
        scores = self.linear(both_ways(self.gru, code.masked_fill(beyond[..., None], 0), lengths))
        weights = (scores.masked_fill(beyond[..., None], -10000) / 0.1).softmax(dim=1)
        ordered = features[:, :longest].masked_fill(beyond[..., None], -10000).sort(dim=1, descending=True).values
        return (ordered.masked_fill(beyond[..., None], 0) * weights).sum(dim=1), weights


class Regions(nn.Module):
    def __init__(self, width: int, embed: int):
        super().__init__()
        self.fc, self.mlp, self.gpool = nn.Linear(width, embed), nn.Module(), Pooling()
        self.mlp.layers = nn.ModuleList([nn.Linear(width, embed // 2), nn.Linear(embed // 2, embed)])
        self.mlp.bns = nn.ModuleList([nn.BatchNorm1d(embed // 2), nn.BatchNorm1d(embed)])

    def forward(self, images, lengths, draws=None):
        first, second = self.mlp.layers
        hidden = self.mlp.bns[0](first(images).flatten(0, 1)).view(*images.shape[:2], -1)
        return self.gpool(self.fc(images) + second(hidden.relu()), lengths)


class Grid(nn.Module):
    def __init__(self, embed: int, caffe: bool, groups: int, depths: list[int]):
        super().__init__()
        block = torchvision.models.resnet.Bottleneck
        network = torchvision.models.resnet.ResNet(block, depths, num_classes=7, groups=groups, width_per_group=8)
        for stage in (network.layer2, network.layer3, network.layer4) if caffe else ():
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        if caffe:
            network.maxpool = nn.MaxPool2d(3, 2, padding=0, ceil_mode=True)
        self.backbone, self.image_encoder = nn.Module(), nn.Module()
        self.backbone.resnet = network
        parts = list(network.children())[:-2]
        self.backbone.base, self.backbone.top = nn.Sequential(*parts[:-1]), nn.Sequential(parts[-1])
        self.image_encoder.fc, self.image_encoder.gpool = nn.Linear(2048, embed), Pooling()

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images, lengths=None, draws=None):
        cells = self.backbone.top(self.backbone.base(images)).flatten(2).transpose(1, 2)
        if draws is None:
            lengths = torch.full((len(cells),), cells.shape[1])
        else:
            rows = [
                row[first.double() > 0.2 * second.double()] if second > 0.2 else row
                for row, first, second in zip(cells, *draws)
            ]
            lengths, cells = torch.tensor([len(row) for row in rows]), nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self.image_encoder.gpool(self.image_encoder.fc(cells), lengths)


class Words(nn.Module):
    def __init__(self, vocabulary: int, width: int, embed: int, layers: int):
        super().__init__()
        self.embed, self.gpool = nn.Embedding(vocabulary, width), Pooling()
        self.rnn = nn.GRU(width, embed, layers, batch_first=True, bidirectional=True)

    def forward(self, captions, lengths):
        return self.gpool(both_ways(self.rnn, self.embed(captions), lengths), lengths)


class Bert(nn.Module):
    def __init__(self, embed: int):
        super().__init__()
        self.bert, self.linear, self.gpool = BertModel(BertConfig(**BERT)), nn.Linear(36, embed), Pooling()

    def forward(self, captions, lengths):
        states = self.bert(captions, attention_mask=(captions != 0).float()).last_hidden_state
        return self.gpool(self.linear(states), lengths)


class Reference:
    """Both encoders, a batch and the options; `write` makes a case folder of them."""

    def __init__(self, image: nn.Module, text: nn.Module, inputs: dict, prefix: str = "module.", **options):
        self.image, self.text, self.inputs, self.prefix = image, text, inputs, prefix
        self.options = {**OPTIONS, "no_imgnorm": False, **options}
        generator = torch.Generator().manual_seed(5)
        for name, tensor in [*image.state_dict().items(), *text.state_dict().items()]:
            if tensor.is_floating_point() and tensor.ndim == 1:  # nothing is left at a constant initial value
                positive = name.endswith(("weight", "_var"))
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator) + (1 if positive else 0))

    def embeddings(self, draws=None) -> dict[str, torch.Tensor]:
        images, image_weights = self.image(self.inputs["images"], self.inputs.get("image_lengths"), draws)
        texts, text_weights = self.text(self.inputs["captions"], self.inputs["caption_lengths"])
        if not self.options["no_imgnorm"]:
            images = images / (images.norm(dim=1, keepdim=True) + 1e-8)
        texts = texts / (texts.norm(dim=1, keepdim=True) + 1e-8)
        names = ("img.gpool.weights", "txt.gpool.weights", "img_emb", "cap_emb", "scores")
        return dict(zip(names, (image_weights, text_weights, images, texts, images @ texts.T)))

    def loss(self, scores: torch.Tensor, hardest: bool) -> torch.Tensor:
        own, same = scores.diag(), torch.eye(len(scores), dtype=torch.bool)
        hinges = [
            (self.options["margin"] + scores - own[:, None]).clamp(min=0).masked_fill(same, 0),
            (self.options["margin"] + scores - own[None, :]).clamp(min=0).masked_fill(same, 0).T,
        ]
        return sum(part.max(dim=1).values.sum() if hardest else part.sum() for part in hinges)

    def named(self) -> dict[str, nn.Parameter]:
        sides = {"img_enc.": self.image, "txt_enc.": self.text}
        return {
            side + self.prefix + name: value for side, part in sides.items() for name, value in part.named_parameters()
        }

    def write(self, folder, **config) -> None:
        states = [
            {self.prefix + name: value.clone() for name, value in part.state_dict().items()}
            for part in (self.image, self.text)
        ]
        content = {
            "epoch": 1,
            "model": states,
            "best_rsum": 1.0,
            "opt": argparse.Namespace(**self.options),
            "Eiters": 5,
        }
        torch.save(content, folder / "checkpoint.pth")
        save_file(self.inputs, folder / "inputs.safetensors")
        (folder / "config.json").write_text(json.dumps({"opt": self.options, **config}))

    def write_model_case(self, folder, sections: dict[str, int | None], draws=None, **config) -> None:
        """Both modes' embeddings and losses, and gradients of each section name -> frozen stages."""
        self.write(folder, **config)
        outputs, gradients = {}, {}
        for mode in ("eval", "train"):
            for part in (self.image, self.text):
                part.train(mode == "train")
            found = self.embeddings(draws if mode == "train" else None)
            if isinstance(self.image, Grid):
                found["img.image_encoder.gpool.weights"] = found.pop("img.gpool.weights")
            outputs |= {f"{mode}.{name}": value.detach().contiguous() for name, value in found.items()}
            for form in ("sum_of_hinges", "max_violation"):
                outputs[f"loss.{mode}.{form}"] = self.loss(found["scores"], form == "max_violation").detach()
        for section, stages in sections.items():
            parameters = self.named()
            for name, parameter in parameters.items():
                early = (
                    "resnet.conv1",
                    "resnet.bn1",
                    *(f"resnet.layer{stage}." for stage in range(1, (stages or 0) + 1)),
                )
                parameter.requires_grad_(not (stages and any(part in name for part in early)))
                parameter.grad = None
            self.loss(self.embeddings(draws)["scores"], "max" in section).backward()
            gradients[section] = {
                name: None if value.grad is None else value.grad.norm().item() for name, value in parameters.items()
            }
        save_file(outputs, folder / "outputs.safetensors")
        (folder / "grads.json").write_text(json.dumps(gradients))

    def write_steps_case(
        self, folder, groups: list[dict], alphas: list, draws: list, sgd: dict | None = None, **config
    ) -> None:
        """As many steps as `alphas`; `groups`: of AdamW, or of SGD with the options `sgd`."""
        stated = [
            {"lr": group["lr"], "weight_decay": group["weight_decay"], "n_tensors": len(group["params"])}
            | ({"betas": [0.9, 0.999], "eps": 1e-8} if sgd is None else sgd)
            for group in groups
        ]
        factors = [1.0] * len(alphas)
        self.write(folder, lr_factor_before_step=factors, warmup_alpha_per_step=alphas, param_groups=stated, **config)
        for part in (self.image, self.text):
            part.train()
        optimizer = torch.optim.AdamW(groups) if sgd is None else torch.optim.SGD(groups, **sgd)
        parameters = self.named()
        losses, norms = [], []
        for alpha, pair in zip(alphas, draws):
            loss = self.loss(self.embeddings(pair)["scores"], self.options["max_violation"])
            optimizer.zero_grad()
            (loss * (1 if alpha is None else alpha)).backward()
            norms.append(nn.utils.clip_grad_norm_(parameters.values(), self.options["grad_clip"]))
            optimizer.step()
            losses.append(loss.detach())
        outputs = {"loss_per_step": torch.stack(losses), "grad_norm_before_clip": torch.stack(norms)}
        name = next(name for name in parameters if name.endswith("fc.weight") and "resnet" not in name)
        outputs[f"after.{name}"] = parameters[name].detach()
        save_file(outputs, folder / "outputs.safetensors")
        after = {
            name: [value.double().norm().item(), value.double().sum().item()] for name, value in parameters.items()
        }
        (folder / "params_after.json").write_text(json.dumps(after))


def captions(lengths: list[int], vocabulary: int, width: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor(lengths)
    ids = torch.randint(1, vocabulary, (len(lengths), width))
    return {"captions": ids * (torch.arange(width) < lengths[:, None]), "caption_lengths": lengths}


def region_bigru() -> Reference:
    torch.manual_seed(2)
    lengths = torch.tensor([7, 1, 4, 6, 2])
    images = torch.randn(5, 10, 18) * (torch.arange(10)[:, None] < lengths[:, None, None])  # wider than the longest
    inputs = {"images": images, "image_lengths": lengths, **captions([9, 7, 7, 3, 2], 30, 9)}
    text = Words(30, 14, 24, layers=2)
    options = {"img_dim": 18, "word_dim": 14, "num_layers": 2, "no_imgnorm": True}
    return Reference(Regions(18, 24), text, inputs, prefix="", **options)


def grid(text: str, caffe: bool, groups: int) -> Reference:
    torch.manual_seed(3)
    inputs = {"images": torch.randn(4, 3, 70, 104), **captions([8, 3, 8, 5], 40, 8)}
    encoder = Bert(24) if text == "bert" else Words(40, 10, 24, layers=1)
    if text == "bert":
        inputs["captions"][0, 3] = 0  # a word replaced by padding: pooled, not attended to
    options = {"img_dim": 2048, "backbone_source": "my_detector" if caffe else "wsl"}
    return Reference(Grid(24, caffe, groups, [1, 2, 1, 1]), encoder, inputs, **options)


def with_draws(reference: Reference, steps: int | None = None) -> list[torch.Tensor]:
    shape = (4, reference.image(reference.inputs["images"])[1].shape[1])
    shapes = [shape, shape[:1]] if steps is None else [(steps, *shape), (steps, shape[0])]
    draws = [torch.rand(part) for part in shapes]
    draws[0][..., :2] *= 0.1  # few cells: make sure that some go
    reference.inputs |= {"rand_list_1": draws[0], "rand_list_2": draws[1]}
    return draws


def failures(case) -> list[str]:
    return [str(line) for line in case.lines if line.verdict == "FAIL"]


SECTIONS = {"loss.train.sum_of_hinges": None, "loss.train.max_violation": None}
FROZEN = {"loss.train.max_violation|fixed_blocks=1": 1, "loss.train.sum_of_hinges|fixed_blocks=0": 0}


def test_two_layers_of_gru_and_raw_scores(tmp_path):
    region_bigru().write_model_case(tmp_path, SECTIONS)
    case = run("vse", "region_bigru", tmp_path)
    assert not failures(case)
    assert sum(line.verdict == "ok" for line in case.lines) > 90
    config = json.loads((tmp_path / "config.json").read_text())
    config["opt"]["no_imgnorm"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    failed = {line.name for line in run("vse", "region_bigru", tmp_path).lines if line.verdict == "FAIL"}
    assert "eval.img_emb" in failed and "eval.cap_emb" not in failed


@pytest.mark.parametrize(("text", "caffe", "groups"), [("bert", False, 2), ("bigru", True, 1)])
def test_other_networks(text, caffe, groups, tmp_path):
    reference = grid(text, caffe, groups)
    draws = with_draws(reference)
    assert any(draws[1] > 0.2)
    reference.write_model_case(tmp_path, FROZEN, draws, bert=BERT)
    kind = "grid_wsl_bert" if text == "bert" else "grid_detector_bigru"
    case = run("vse", kind, tmp_path)
    assert not failures(case)
    assert sum(line.verdict == "ok" for line in case.lines) > 120
    other = {"bert": BERT, "backbone": {"graph": "torchvision" if caffe else "caffe"}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    failed = {line.name for line in run("vse", kind, tmp_path).lines if line.verdict == "FAIL"}
    assert "eval.img_emb" in failed and "eval.cap_emb" not in failed


@pytest.mark.parametrize("hardest", [True, False])
def test_steps_of_a_grid_with_bigru(hardest, tmp_path):
    reference = grid("bigru", caffe=True, groups=1)
    reference.options["max_violation"] = hardest
    draws = with_draws(reference, steps=2)
    cnn, head, text = reference.image.backbone, reference.image.image_encoder, reference.text
    rate = reference.options["learning_rate"]
    parts = [(text, 1.0), (cnn.top, TRAINED_CNN), (cnn.base, TRAINED_CNN), (head, 1.0)]
    groups = [{"params": list(part.parameters()), "lr": rate * factor, "weight_decay": 1e-4} for part, factor in parts]
    reference.write_steps_case(tmp_path, groups, [0.5, None], list(zip(*draws)))
    case = run("vse", "train_step_bigru", tmp_path)
    assert not failures(case)
    stored = json.loads((tmp_path / "params_after.json").read_text())
    stored["img_enc.module.backbone.top.0.0.bn1.bias"] = stored["img_enc.module.backbone.resnet.layer4.0.bn1.bias"]
    stored["txt_enc.module.embed.weight"][0] *= 1.001
    (tmp_path / "params_after.json").write_text(json.dumps(stored))
    assert len(failures(run("vse", "train_step_bigru", tmp_path))) == 1


@pytest.mark.parametrize("decay", [0.01, 1e-4])
def test_steps_of_regions_with_bigru_decay_more(decay, tmp_path):
    reference = region_bigru()
    everything = [*reference.image.parameters(), *reference.text.parameters()]
    groups = [{"params": everything, "lr": 5e-4, "weight_decay": decay}]
    reference.write_steps_case(
        tmp_path, groups, [None] * 3, [None] * 3, parameters_with_zero_gradient=["img_enc.*mlp.layers.0.bias"]
    )
    case = run("vse", "train_step_bigru", tmp_path)
    assert [name.split()[1] for name in failures(case)][:1] == ([] if decay == 0.01 else ["param_groups"])


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_of_a_grid_with_sgd(nesterov, tmp_path):
    reference = grid("bert", caffe=False, groups=2)
    reference.options["optim"] = "sgd"
    draws = with_draws(reference, steps=3)
    cnn, head, text = reference.image.backbone, reference.image.image_encoder, reference.text
    rate, bert = reference.options["learning_rate"], list(text.bert.parameters())
    rest = [value for name, value in text.named_parameters() if not name.startswith("bert.")]
    trained = [*cnn.top.parameters(), *cnn.base.parameters()]
    parts = [(rest, 1.0, 0.0), (bert, 0.1, 0.0), (trained, TRAINED_CNN, 1e-4), (list(head.parameters()), 1.0, 0.0)]
    groups = [{"params": part, "lr": rate * factor, "weight_decay": decay} for part, factor, decay in parts]
    momentum = {"momentum": 0.9, "nesterov": nesterov}
    reference.write_steps_case(tmp_path, groups, [None] * 3, list(zip(*draws)), momentum, bert=BERT)
    failed = failures(run("vse", "train_step_grid", tmp_path))
    assert any("param_groups" in line for line in failed) == (not nesterov)
    assert nesterov == (not failed)


def test_another_optimizer_is_not_run(tmp_path):
    reference = region_bigru()
    reference.options["optim"] = "sgd"
    groups = [{"params": list(reference.text.parameters()), "lr": 5e-4, "weight_decay": 0.01}]
    reference.write_steps_case(tmp_path, groups, [None], [None])
    assert any("opt.optim is 'sgd'" in line for line in failures(run("vse", "train_step_bigru", tmp_path)))


def copied(case: str, folder) -> Path:
    return Path(shutil.copytree(Path(__file__).parents[1] / "golden" / "vse" / case, folder / case))


@pytest.mark.parametrize(("stated", "factor"), [("lr_initial", 1.0), ("lr_now", 1.0), ("lr_now", 3.0)])
def test_groups_with_one_rate_state_the_first_or_the_last(stated, factor, tmp_path):
    folder = copied("train_step_region", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for group in config["param_groups"]:
        group["lr"] = group[stated] * factor
        del group["lr_initial"], group["lr_now"]
    (folder / "config.json").write_text(json.dumps(config))
    failed = failures(run("vse", "train_step_region", folder))
    assert len(failed) == (factor != 1.0) and all("param_groups" in line for line in failed)


@pytest.mark.parametrize(("shift", "fits"), [(1e-3, True), (1e-2, False)])
def test_a_parameter_without_gradient_may_wander_as_far_as_its_steps(shift, fits, tmp_path):
    folder = copied("train_step_region", tmp_path)
    name = "img_enc.mlp.layers.0.bias"
    outputs = load_file(folder / "outputs.safetensors")
    outputs[f"after.{name}"] = read_original(folder / "checkpoint.pth").state[name] + shift
    save_file(outputs, folder / "outputs.safetensors")
    assert (not failures(run("vse", "train_step_region", folder))) == fits
