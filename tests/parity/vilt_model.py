"""Cases with ViLT's weights: checkpoint, converter, our classes, stored states, losses and gradients; and its optimizer.

What runs follows from the folder: sizes from the weights, heads and active tasks from config.json, draws from the inputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from conversion.from_vilt import convert_all_heads, read_original
from conversion.tables import ConversionError, forward_names, original_value
from conversion.vilt_layouts import MODALITIES, vilt_table
from hf_vlp.inputs.patch_selection import patch_mask
from hf_vlp.layers.patch_embedding import fitted_positions
from hf_vlp.models.vilt.configuration_vilt import VlpViltConfig
from hf_vlp.models.vilt.modeling_vilt import VlpViltForPreTraining, VlpViltModel
from hf_vlp.models.vilt.tasks_vilt import (
    VlpViltForImageTextRetrieval,
    VlpViltForVisualQuestionAnswering,
    VlpViltForVisualReasoning,
)
from hf_vlp.objectives.word_patch_alignment import (
    cosine_cost,
    patches_to_align,
    transport_distance,
    transport_plan,
    words_to_align,
)
from hf_vlp.training.optim import TransformersAdamW, parameter_groups, rate_factor
from tests.parity.harness import Case, CaseError

WPA_WEIGHT = 0.1  # fixed in the released code
PRETRAINING = ("mlm", "mpp", "itm")
IN_ORDER = (*PRETRAINING, "vqa", "nlvr2", "irtr")  # as the released code runs them
STATES = ("embeddings", "final_norm", "layer_")  # values of words and patches, of which padding patches do not count
OPTIMIZERS = {
    "adamw": (TransformersAdamW, {"betas": (0.9, 0.98), "eps": 1e-8}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}
# the norms of the task heads decay, as in the released code
UNDECAYED = (r"bias$", r"(^vilt\.|_head\.).*norm\d?\.weight$")
HEADS_OF_TASKS = r"^classifier\."


class Checkpoint:
    """A weight file of the original, converted strictly; models of it, and values under its names by way of the table."""

    def __init__(self, path, options: Mapping):
        self.options = options
        self.original = read_original(path).state
        self.config, self.state = convert_all_heads(self.original, options)
        self.table = vilt_table(len(self.original[MODALITIES]))

    @property
    def active(self) -> list[str]:
        """Tasks that run: those of a switch of 1 or more."""
        return [name for name, switch in self.options["loss_names"].items() if switch >= 1]

    def build(self, model_class: type, **fields) -> nn.Module:
        """A model of these weights, of as many heads as it has."""
        config = VlpViltConfig(**{**self.config.to_dict(), **fields})
        model = model_class(config).eval()
        held = model.state_dict()
        missing = [name for name in held if self.name_of(name, model) not in self.state]
        if missing:
            raise CaseError(f"the checkpoint lacks {', '.join(missing[:5])} of {model_class.__name__}")
        model.load_state_dict({name: self.state[self.name_of(name, model)] for name in held})
        if model_class is VlpViltForPreTraining and model.vilt.pooler is None:
            model.vilt.pooler = self.trunk().pooler  # without matching of no use, but the original has it
        return model

    def name_of(self, name: str, model: nn.Module) -> str:
        """The converter's name for a parameter of one of our classes, whose classifiers are called alike."""
        task = {VlpViltForVisualQuestionAnswering: "vqa", VlpViltForVisualReasoning: "nlvr2"}.get(type(model))
        return f"{task}_{name}" if task and name.startswith("classifier.") else name

    def trunk(self) -> VlpViltModel:
        """The transformer alone."""
        model = VlpViltModel(self.config).eval()
        prefix = "vilt."
        model.load_state_dict({name: self.state[prefix + name] for name in model.state_dict()})
        return model

    def to_original(self, name: str, ours: Mapping[str, torch.Tensor | None]) -> torch.Tensor | None:
        """One value under the original's name; None where none of our parts has one."""
        parts = forward_names(name, self.table)
        given = {part: ours.get(part) for part in parts}
        if all(value is None for value in given.values()):
            return None
        filled = {part: torch.zeros_like(self.state[part]) if value is None else value for part, value in given.items()}
        return original_value(name, filled, self.table)


def checkpoints(case: Case) -> Iterator[tuple[Checkpoint, str]]:
    """Every weight file of the folder, and a label for its lines if there are several."""
    paths = case.weight_files()
    for path in paths:
        yield Checkpoint(path, case.config), f"{path.name}: " if len(paths) > 1 else ""


def pixels_seen(pixels: torch.Tensor) -> torch.Tensor:
    """The mask [B, H, W] that the released code derives: a pixel whose channels add up to 0 is padding."""
    return pixels.sum(dim=1).ne(0).long()


# ---------------------------------------------------------------------------------------------------------------------
# Intermediate values


@contextmanager
def recording(model: VlpViltModel) -> Iterator[dict[str, torch.Tensor]]:
    """Results of the parts of one plain pass under the names of the stored values."""
    found: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, inputs, output: found.__setitem__(name, output.detach())

    layers = model.encoder.layers
    handles = [
        model.text_embeddings.register_forward_hook(keep("text_embeddings")),
        model.image_embeddings.patch_embedding.register_forward_hook(keep("patch_projection")),
        layers[0].register_forward_pre_hook(lambda module, inputs: found.__setitem__("embeddings", inputs[0].detach())),
        model.norm.register_forward_hook(keep("final_norm")),
        *(layer.register_forward_hook(keep(f"layer_{number}")) for number, layer in enumerate(layers)),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def one_pass(
    case: Case,
    model: VlpViltModel,
    name: str,
    words: tuple[torch.Tensor, torch.Tensor],
    pixels: torch.Tensor,
    label: str,
    replaced: torch.Tensor | None = None,
    modality: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Runs and compares one pass; returns its states `text` and `image`, their masks, and `pooled`.

    replaced: [B, P], patches that the mask token hides. modality: [B, 1, D] of the images, if not the table's.
    """
    ids, mask = words
    selection = case.inputs.get(f"{name}.patch_select")
    with recording(model) as found, torch.no_grad():
        embeds, image_mask, index, grid = model.image_embeddings(pixels, pixels_seen(pixels), selection, replaced)
        output = model(ids, mask, image_embeds=embeds, image_mask=image_mask, image_modality=modality)
    values = {
        "cls_feats": output.pooler_output,
        "pooled": output.pooler_output,
        "raw_cls_feats": output.last_hidden_state[:, 0],
        "image_masks": image_mask,
        "co_masks": torch.cat([mask, image_mask], dim=1),
        "patch_index": torch.stack([index // grid[1], index % grid[1]], dim=-1),
        "patch_grid": torch.tensor(grid),
        **found,
    }
    counted = torch.cat([torch.ones_like(mask), image_mask], dim=1)
    for key, value in values.items():
        case.compare({f"{name}.{key}": value}, label, counted if key.startswith(STATES) else None)
    return {
        "text": output.text_hidden_states,
        "image": output.image_hidden_states,
        "text_mask": mask,
        "image_mask": image_mask,
        "index": index,
        "pooled": output.pooler_output,
    }


def positions(case: Case, model: VlpViltModel, pixels: torch.Tensor, label: str) -> None:
    """The position grids of the first pass, [D, h, w] of each image."""
    patch = model.config.patch_size
    visible = patch_mask(pixels_seen(pixels), patch)
    heights, widths = visible[:, :, 0].sum(dim=1), visible[:, 0].sum(dim=1)
    table = model.image_embeddings.position_embedding[1:].detach()
    fitted = fitted_positions(table, heights, widths, tuple(visible.shape[1:]))
    for row, (height, width) in enumerate(zip(heights.tolist(), widths.tolist())):
        grid = fitted[row].view(*visible.shape[1:], -1)[:height, :width]
        case.compare({f"pos_embed_interpolated_image{row}": grid.permute(2, 0, 1)}, label)


def backbone(case: Case) -> None:
    """One pass named `infer`."""
    for checkpoint, label in checkpoints(case):
        model, inputs = checkpoint.trunk(), case.inputs
        one_pass(case, model, "infer", (inputs["text_ids"], inputs["text_masks"]), inputs["image"], label)
        positions(case, model, inputs["image"], label)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def tasks(case: Case) -> None:
    """Every active task: its pass, logits, loss and gradients."""
    for checkpoint, label in checkpoints(case):
        inputs, active = case.inputs, checkpoint.active
        trunk = checkpoint.trunk()
        positions(case, trunk, first_images(inputs, active), label)
        losses: dict[str, tuple[torch.Tensor, nn.Module]] = {}
        if set(active) & set(PRETRAINING):
            losses |= pretraining(case, checkpoint, label)
        for task, run in (("vqa", answering), ("nlvr2", reasoning), ("irtr", retrieval)):
            if task in active:
                losses |= run(case, checkpoint, label)
        total = sum(loss for loss, _ in losses.values())
        case.compare({name: loss for name, (loss, _) in losses.items()} | {"total_loss": total}, label)
        for section in case.gradients:
            chosen = losses.values() if section == "total_loss" else [losses[section]]
            case.compare_gradients(section, gradients(checkpoint, list(chosen)), label)


def first_images(inputs: Mapping[str, torch.Tensor], active: list[str]) -> torch.Tensor:
    """Pixels of the first pass of the released code, where every task has its own rows of them."""
    first = next(task for task in IN_ORDER if task in active)
    if first == "itm":
        return images_to_match(inputs)
    if first == "irtr":
        return inputs["image"].repeat_interleave(1 + len(false_texts(inputs)), dim=0)
    return inputs["image_0" if first == "nlvr2" else "image"]


def images_to_match(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A text's own image where it shall match, the false one elsewhere."""
    return torch.where(inputs["itm_labels"].view(-1, 1, 1, 1) == 1, inputs["image"], inputs["false_image_0"])


def gradients(checkpoint: Checkpoint, losses: list[tuple[torch.Tensor, nn.Module]]) -> dict[str, torch.Tensor | None]:
    """Of the sum of the losses, under the original's names; several models of one checkpoint add up."""
    ours: dict[str, torch.Tensor | None] = {}
    for loss, model in losses:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(named, found, strict=True):
            name = checkpoint.name_of(name, model)
            if gradient is not None:
                ours[name] = gradient if ours.get(name) is None else ours[name] + gradient
    return {
        name: checkpoint.to_original(name, ours)
        for name, tensor in checkpoint.original.items()
        if tensor.is_floating_point()
    }


def pretraining(case: Case, checkpoint: Checkpoint, label: str) -> dict[str, tuple[torch.Tensor, nn.Module]]:
    """The terms among masked words, masked patches and matching with word-patch alignment that are active."""
    inputs, active = case.inputs, checkpoint.active
    on = {f"{name}_weight": float(name in active) for name in PRETRAINING}
    model = checkpoint.build(VlpViltForPreTraining, **on, wpa_weight=WPA_WEIGHT * on["itm_weight"])
    if on["itm_weight"] and checkpoint.options["loss_names"].get("irtr", 0) > 0:
        model.itm_head.requires_grad_(False)  # as soon as there is a rank head
    words = inputs["text_ids"], inputs["text_masks"]
    pixels = inputs["image"]
    batch = {
        "input_ids": words[0],
        "attention_mask": words[1],
        "pixel_values": pixels,
        "pixel_mask": pixels_seen(pixels),
    }
    values = {}
    if "mlm" in active:
        masked = inputs["text_ids_mlm"], inputs["text_labels_mlm"]
        states = one_pass(case, model.vilt, "mlm", (masked[0], words[1]), pixels, label)
        values |= {"mlm_logits": model.mlm_head(states["text"]), "mlm_labels": masked[1], "mlm_ids": masked[0]}
        batch |= {"mlm_input_ids": masked[0], "mlm_labels": masked[1], "patch_index": inputs.get("mlm.patch_select")}
    if "mpp" in active:
        batch |= {"mpp_mask": inputs["mpp_masked_indices"], "mpp_replace": inputs["mpp_replace_draw"]}
        values |= patches(case, model, batch, label)
    if "itm" in active:
        labels = inputs["itm_labels"].long()
        chosen = images_to_match(inputs)
        states = one_pass(case, model.vilt, "itm", words, chosen, label)
        values |= {"itm_logits": model.itm_head(states["pooled"]), "itm_labels": inputs["itm_labels"].float()}
        values |= alignment(states, checkpoint)
        batch |= {
            "itm_pixel_values": chosen,
            "itm_pixel_mask": pixels_seen(chosen),
            "itm_labels": labels,
            "itm_patch_index": inputs.get("itm.patch_select"),
        }
    case.compare(values, label)
    losses = model(**batch).losses
    named = {"mlm": "mlm_loss", "mim": "mpp_loss", "itm": "itm_loss", "wpa": "itm_wpa_loss"}
    return {named[name]: ((WPA_WEIGHT if name == "wpa" else 1.0) * loss, model) for name, loss in losses.items()}


def patches(case: Case, model: VlpViltForPreTraining, batch: dict, label: str) -> dict[str, torch.Tensor]:
    """The pass with masked patches, its labels and logits; both passes of a case may select other patches."""
    words, hidden = (batch["input_ids"], batch["attention_mask"]), batch["mpp_mask"] * batch["mpp_replace"]
    states = one_pass(case, model.vilt, "mpp", words, batch["pixel_values"], label, replaced=hidden)
    batch["mpp_patch_index"] = states["index"]
    seen = states["image_mask"][:, 1:]
    labels = model.patch_labels(batch["pixel_values"], batch["mpp_mask"], states["index"], seen)
    labels = nn.functional.pad(labels, (0, 0, 1, 0), value=-100)  # the class token has none
    logits = model.mpp_head(states["image"]).unflatten(-1, (3, -1))
    counted = states["image_mask"]
    case.compare({"mpp_logits": logits}, label, counted)
    return {"mpp.image_labels": labels, "mpp_labels": labels}


def alignment(states: dict[str, torch.Tensor], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Cost, plan and distance of word-patch alignment under the names and in the layout of the stored ones."""
    cost = cosine_cost(states["text"], states["image"])
    words, seen = words_to_align(states["text_mask"]), patches_to_align(states["image_mask"])
    pairs = words.unsqueeze(-1) & seen.unsqueeze(1)
    plan = transport_plan(
        cost, words, seen, beta=checkpoint.config.wpa_beta, iterations=checkpoint.config.wpa_iterations
    )
    return {
        "wpa_cost": cost.masked_fill(~pairs, 0),
        "wpa_plan": plan.transpose(1, 2),
        "wpa_distance": transport_distance(cost, plan),
        "wpa_txt_pad": (~words).long(),
        "wpa_img_pad": (~seen).long(),
    }


def answering(case: Case, checkpoint: Checkpoint, label: str) -> dict[str, tuple[torch.Tensor, nn.Module]]:
    """VQA: soft scores at the listed answers, the last of several for one."""
    model, inputs = checkpoint.build(VlpViltForVisualQuestionAnswering), case.inputs
    words, pixels = (inputs["text_ids"], inputs["text_masks"]), inputs["image"]
    states = one_pass(case, model.vilt, "vqa", words, pixels, label)
    targets = torch.zeros(len(pixels), checkpoint.config.num_labels)
    for row, (answers, scores) in enumerate(zip(inputs["vqa_labels"].tolist(), inputs["vqa_scores"].tolist())):
        for answer, score in zip(answers, scores, strict=True):
            if answer >= 0:
                targets[row, answer] = score
    case.compare({"vqa_logits": model.classifier(states["pooled"]), "vqa_targets": targets}, label)
    output = model(*words, pixels, pixels_seen(pixels), inputs.get("vqa.patch_select"), labels=targets)
    return {"vqa_loss": (output.loss, model)}


def reasoning(case: Case, checkpoint: Checkpoint, label: str) -> dict[str, tuple[torch.Tensor, nn.Module]]:
    """NLVR2: two passes, here compared one by one, and run together by the class."""
    model, inputs = checkpoint.build(VlpViltForVisualReasoning), case.inputs
    words, pixels = (inputs["text_ids"], inputs["text_masks"]), [inputs["image_0"], inputs["image_1"]]
    modality = [model.vilt.modality_embeddings.weight[1:], model.second_image_embedding]
    pooled = [
        one_pass(
            case,
            model.vilt,
            f"nlvr2_image{number}",
            words,
            image,
            label,
            modality=modality[number].expand(len(image), 1, -1).detach(),
        )["pooled"]
        for number, image in enumerate(pixels)
    ]
    labels = inputs["answers"]
    logits = model.classifier(torch.cat(pooled, dim=1))
    height, width = (max(image.shape[axis] for image in pixels) for axis in (-2, -1))
    canvas = [nn.functional.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in pixels]
    both, seen = torch.stack(canvas, dim=1), torch.stack([pixels_seen(image) for image in canvas], dim=1)
    chosen = selections_of_two(inputs, pixels, seen, model.config.patch_size)
    output = model(*words, both, seen, chosen, labels=labels)
    case.compare({"nlvr2_logits": logits, "nlvr2_labels": labels}, label)
    case.check(f"{label}nlvr2_logits of both together", output.logits, logits, 2e-5)
    return {"nlvr2_loss": (output.loss, model)}


def selections_of_two(
    inputs: Mapping[str, torch.Tensor], pixels: list[torch.Tensor], seen: torch.Tensor, patch: int
) -> torch.Tensor | None:
    """The recorded selections [B, 2, n] as numbers in the grid of the common canvas, the shorter one filled up with padding."""
    names = [f"nlvr2_image{number}.patch_select" for number in (0, 1)]
    if not set(names) <= set(inputs):
        return None
    own, common = [image.shape[-1] // patch for image in pixels], seen.shape[-1] // patch
    placed = [inputs[name] // width * common + inputs[name] % width for name, width in zip(names, own)]
    padding = [patch_mask(seen[:, number], patch).flatten(1).argmin(dim=1, keepdim=True) for number in (0, 1)]
    longest = max(select.shape[1] for select in placed)
    filled = [
        torch.cat([select, rest.expand(-1, longest - select.shape[1])], dim=1) for select, rest in zip(placed, padding)
    ]
    return torch.stack(filled, dim=1)


def false_texts(inputs: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and mask of each of the false texts."""
    found = []
    while f"false_text_{len(found)}_ids" in inputs:
        name = f"false_text_{len(found)}"
        found.append((inputs[f"{name}_ids"], inputs[f"{name}_masks"]))
    return found


def retrieval(case: Case, checkpoint: Checkpoint, label: str) -> dict[str, tuple[torch.Tensor, nn.Module]]:
    """Each image with its text and the false ones, image by image."""
    model, inputs = checkpoint.build(VlpViltForImageTextRetrieval), case.inputs
    texts = [(inputs["text_ids"], inputs["text_masks"]), *false_texts(inputs)]
    longest = max(ids.shape[1] for ids, _ in texts)
    ids, mask = (
        torch.stack([nn.functional.pad(text[part], (0, longest - text[part].shape[1])) for text in texts], dim=1)
        for part in (0, 1)
    )
    pixels = inputs["image"]
    rows = pixels.repeat_interleave(len(texts), dim=0)
    flat, seen = (ids.flatten(0, 1), mask.flatten(0, 1)), pixels_seen(rows)
    states = one_pass(case, model.vilt, "irtr", flat, rows, label)
    labels = torch.zeros(len(pixels), dtype=torch.long)
    real = patch_mask(seen, model.config.patch_size).flatten(1).sum(dim=1)
    if torch.equal(states["image_mask"][:, 1:].sum(dim=1), real):
        loss = model(ids, mask, pixels, pixels_seen(pixels), labels=labels).loss
    else:  # every pair has drawn other patches of its image
        scores = model(*flat, rows, seen, inputs["irtr.patch_select"]).logits
        loss = nn.functional.cross_entropy(scores.view(len(pixels), -1), labels)
    return {"irtr_loss": (loss, model)}


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def total_steps(trainer: Mapping) -> int:
    """Optimizer steps of a run, as the released code counts them."""
    return trainer["max_steps"] or trainer["n_batches"] * trainer["max_epochs"] // trainer["acc"]


CLASSES = {
    "vqa": VlpViltForVisualQuestionAnswering,
    "nlvr2": VlpViltForVisualReasoning,
    "irtr": VlpViltForImageTextRetrieval,
}


def optimizer(case: Case) -> None:
    """Groups, rates and some updates with the given gradients."""
    options, expected = case.config, case.json("expected.json")
    case.expect({f"expected.json: {name}": value for name, value in expected.items()})
    total = total_steps(options["_trainer"])
    warmup = options["warmup_steps"]
    warmup = int(total * warmup) if isinstance(warmup, float) else warmup
    case.compare({"expected.json: total_steps": total, "expected.json: warmup_steps": warmup})
    for checkpoint, label in checkpoints(case):
        lr = options["learning_rate"]
        parameters, groups = grouped(checkpoint, lr)
        compare_groups(case, checkpoint, parameters, groups, expected["groups"])
        peaks = [lr, lr, lr * options["lr_mult"], lr * options["lr_mult"]]
        for step, rates in expected["lr_by_step"].items():
            compare_rates(case, int(step), rates, peaks, total, warmup, options)
        update(case, checkpoint, parameters, groups, total, warmup, label)


def grouped(checkpoint: Checkpoint, lr: float) -> tuple[dict[str, nn.Parameter], list[dict]]:
    """Parameters by the converter's names, and the groups of each class that has one of the heads, everything once."""
    options = checkpoint.options
    built = {name for name, switch in options["loss_names"].items() if switch > 0}
    kinds: dict[type, dict] = {CLASSES[name]: {} for name in CLASSES if name in built}
    if built & set(PRETRAINING) - ({"itm"} if "irtr" in built else set()) or not kinds:
        switches = {f"{name}_weight": float(name in built) for name in PRETRAINING}
        kinds[VlpViltForPreTraining] = {**switches, "wpa_weight": 0.0}
    parameters: dict[str, nn.Parameter] = {}
    groups = []
    for kind, fields in kinds.items():
        model = checkpoint.build(kind, **fields)
        if "irtr" in built and hasattr(model, "itm_head"):
            model.itm_head.requires_grad_(False)  # beside a rank head
        names = {p: checkpoint.name_of(name, model) for name, p in model.named_parameters()}
        heads = {HEADS_OF_TASKS: float(options["lr_mult"])} if hasattr(model, "classifier") else {}
        for group in parameter_groups(
            model, lr, options["weight_decay"], decay="all", no_decay=UNDECAYED, lr_factors=heads
        ):
            new = [p for p in group["params"] if names[p] not in parameters]
            groups.append({**group, "params": new, "names": [names[p] for p in new]})
        parameters |= {name: p for p, name in names.items() if name not in parameters}
    return parameters, [group for group in groups if group["params"]]


def factor(step: int, total: int, warmup: int, options: Mapping) -> float:
    """The project's factor on the rate of update `step`."""
    cosine = options["decay_power"] == "cosine"
    end = 0.0 if cosine else options["end_lr"] / options["learning_rate"]
    if cosine and step > max(total, warmup):  # the original's wave goes on, and rises again
        after, length = step - warmup, total - warmup
        step = warmup + min(after % (2 * length), -after % (2 * length))
    form = {"name": "cosine"} if cosine else {"name": "polynomial", "power": float(options["decay_power"])}
    return rate_factor(step, **form, total_steps=total, warmup_steps=warmup, end_factor=end)


def compare_rates(case: Case, step: int, rates: list, peaks: list, total: int, warmup: int, options: Mapping) -> None:
    """The rates of the four groups at one update."""
    entry = f"expected.json: lr_by_step: {step}"
    case.expect({entry: rates})
    found = [peak * factor(step, total, warmup, options) for peak in peaks]
    difference = max(abs(one - other) for one, other in zip(found, rates, strict=True))
    case.settle(entry, difference <= 1e-12 + 1e-9 * max(peaks), difference, 1e-9 * max(peaks))


def compare_groups(
    case: Case, checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], groups: list[dict], stored: list[dict]
) -> None:
    """Decay and rate of every parameter of the original; ours has as many groups as differ."""
    entry = "expected.json: groups"
    ours = {name: (group["weight_decay"], round(group["lr"], 12)) for group in groups for name in group["names"]}
    wrong = []
    for group in stored:
        for name in group["params"]:
            found = {ours[part] for part in forward_names(name, checkpoint.table) if part in ours}
            wanted = (group["weight_decay"], round(group["base_lr"], 12))
            frozen = not found and name.startswith("itm_score.")  # beside a rank head, where ours trains it as little
            if found != {wanted} and not frozen:
                wrong.append(f"{name}: {sorted(found)} instead of {wanted}")
    case.settle(entry, not wrong, note="; ".join(wrong[:3]))
    case.listed("expected.json: lr_by_step", "compared step by step")


def update(case: Case, checkpoint: Checkpoint, parameters, groups, total: int, warmup: int, label: str) -> None:
    """One update for each step of gradients in the inputs, and every parameter after those that are stored."""
    steps = sorted({int(name.split(".")[1]) for name in case.inputs if name.startswith("grad.")})
    kind, numbers = OPTIMIZERS[case.config.get("optim_type", "adamw")]
    moved = kind(groups, **numbers)
    peaks = [group["lr"] for group in moved.param_groups]
    for step in steps:
        for parameter in parameters.values():
            parameter.grad = None
        for name in [name for name in case.inputs if name.startswith(f"grad.{step}.")]:
            original = name.removeprefix(f"grad.{step}.")
            for part, value in ours_of(original, case.inputs[name], checkpoint.table).items():
                parameters[part].grad = value.clone()
        for group, peak in zip(moved.param_groups, peaks, strict=True):
            group["lr"] = peak * factor(step, total, warmup, case.config)
        moved.step()
        wanted = f"after_step{step}."
        for name in [name for name in case.outputs if name.startswith(wanted)]:
            values = {part: parameter.detach() for part, parameter in parameters.items()}
            case.compare({name: checkpoint.to_original(name.removeprefix(wanted), values)}, label)


def ours_of(name: str, value: torch.Tensor, table) -> dict[str, torch.Tensor]:
    """A value of the original cut into ours."""
    from conversion.tables import find_row

    found = find_row(name, table)
    if found is None:
        raise ConversionError(f"the table has no row for {name}")
    return dict(zip(found[1], found[0].cut(value), strict=True))
