"""Cases with ALBEF's weights: checkpoint, converter, our classes, stored states, losses, gradients and what a training step leaves.

What runs follows from the folder: sizes from the weights, heads and settings from config.json, draws from the inputs. Rows of states at
padding are not compared: the torch of the released code looked up zeros there.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

from conversion.albef_layouts import table_of
from conversion.albef_task_layouts import TAUGHT, momentum_parts, task_of
from conversion.from_albef import build_model, convert_all, for_task, read_original
from conversion.tables import Repeat, Table, find_row, forward_names, original_value
from hf_vlp.inputs.text_masking import RandomMasking
from hf_vlp.layers.patch_embedding import resize_position_table
from hf_vlp.models.albef.modeling_albef import VlpAlbefModel
from hf_vlp.models.albef.pretraining_albef import VlpAlbefForPreTraining
from hf_vlp.objectives.matching import negative_weights
from hf_vlp.training.optim import parameter_groups, rate_factor
from tests.parity.harness import Case

UNDECAYED = (
    r"bias$",
    r"norm\d?\.weight$",
)  # the temperature and the embeddings of the image decay, as in the released code
LOSSES = {"loss_ita": "itc", "loss_itm": "itm", "loss_mlm": "mlm"}
DRAWS = {"chosen": "draw_masked", "replaced": "draw_replaced", "randomised": "draw_random"}
DRAWS |= {"random_ids": "draw_random_words"}
COPIED = ("visual_encoder", "vision_proj", "text_encoder", "text_proj", "cls_head", "text_decoder")


class Checkpoint:
    """A weight file of the original, converted strictly; a model of it, and values under its names by way of the table."""

    def __init__(self, path, options: Mapping):
        self.original = with_copies(read_original(path).state)
        self.config, ours, unused = convert_all(self.original, options)
        self.converted = for_task(self.config, ours, unused)
        self.table = table_of(self.original, self.config)

    def build(self, options: Mapping) -> nn.Module:
        """The model of these weights, in eval mode, distilling as much as the case says."""
        model = build_model(self.converted)
        distills = options["yaml"].get("distill", True) or isinstance(model, VlpAlbefForPreTraining)  # without a switch
        alpha = options.get("alpha_used")
        model.distillation_weight = float(alpha) if distills and alpha is not None else 0.0
        return model

    def to_original(self, name: str, ours: Mapping[str, torch.Tensor | None]) -> torch.Tensor | None:
        """One value under the original's name; None where none of our parts has one."""
        name = stored_once(name, self.table)
        parts = forward_names(name, self.table)
        if any(ours.get(part) is None for part in parts):
            return None
        return original_value(name, ours, self.table)


def with_copies(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file with queues, or of a task that distils, without the momentum copies: they are of its own weights, as before any update."""
    copies, queues = momentum_parts(state)
    if copies or not (queues or task_of(state) in TAUGHT):
        return dict(state)
    split = [(name.partition("."), tensor) for name, tensor in state.items()]
    return dict(state) | {f"{part}_m.{rest}": tensor for (part, _, rest), tensor in split if part in COPIED}


def stored_once(name: str, table: Table) -> str:
    """The name of the tensor that ours is made of, where a file of the original stores it under two."""
    row = (find_row(name, table) or (None,))[0]
    return row.of if isinstance(row, Repeat) else name


def checkpoints(case: Case) -> Iterator[tuple[Checkpoint, str]]:
    """Every weight file of the folder, and a label for its lines if there are several."""
    paths = case.weight_files()
    for path in paths:
        yield Checkpoint(path, case.config), f"{path.name}: " if len(paths) > 1 else ""


# ---------------------------------------------------------------------------------------------------------------------
# Forward


def backbone(case: Case) -> None:
    """Every layer of one pass, the projections and the heads, and those of the momentum copies."""
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config)
        base = getattr(model, "albef", model)
        with torch.no_grad():
            values = states_of(base, case.inputs)
            if hasattr(model, "itm_head"):
                values["itm_logits"] = model.itm_head(values["multimodal_last_hidden"][:, 0])
            if hasattr(model, "mlm_head"):
                values["mlm_logits"] = model.mlm_head(values["multimodal_last_hidden"])
            if hasattr(model, "teacher"):
                theirs = states_of(model.teacher.albef, case.inputs)
                if hasattr(model, "mlm_head"):
                    theirs["mlm_logits"] = model.teacher.mlm_head(theirs["multimodal_last_hidden"])
                values |= {f"{name}_m": value for name, value in theirs.items()}
        compare_states(case, values, case.inputs["attention_mask"], label)


def states_of(model: VlpAlbefModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Results of the parts under the names of the stored values."""
    words, pixels = (inputs["input_ids"], inputs["attention_mask"]), inputs["image"]
    found: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, inputs, output: found.__setitem__(name, output)

    vision, text = model.vision_model, model.text_model
    layers = [*text.encoder.layers, *model.fusion_model.layers]
    handles = [
        vision.embeddings.patch_embedding.register_forward_hook(keep("vit_patch_embed")),
        vision.embeddings.register_forward_hook(keep("vit_embeddings")),
        text.embeddings.register_forward_hook(keep("text_embeddings")),
        *(block.register_forward_hook(keep(f"vit_block_{row}")) for row, block in enumerate(vision.encoder.layers)),
        *(layer.register_forward_hook(keep(f"text_layer_{row}")) for row, layer in enumerate(layers)),
    ]
    try:
        output = model(*words, pixels)
    finally:
        for handle in handles:
            handle.remove()
    found["vit_patch_embed"] = found["vit_patch_embed"].flatten(2).transpose(1, 2)
    image, states = output.image_hidden_states, output.text_hidden_states
    encoded = model.encode_text(*words)
    found |= {
        "image_embeds": model.encode_image(pixels)["image_embeds"],
        "text_mode_last_hidden": encoded["text_embeds"],
        "fusion_last_hidden": model.fuse(**encoded, image_embeds=image),
        "multimodal_last_hidden": output.last_hidden_state,
        "image_feat": model.project_image(image),
        "text_feat": model.project_text(states),
    }
    if "token_type_ids_optional" in inputs:
        segments = text(*words, token_type_ids=inputs["token_type_ids_optional"]).last_hidden_state
        found["multimodal_with_token_types"] = model.fuse(segments, words[1], image)
    return found


def compare_states(case: Case, values: Mapping[str, torch.Tensor], mask: torch.Tensor, label: str = "") -> None:
    """Compare, states of words at those that are no padding: `mask` [B, L], or twice where there are twice as many rows."""
    words = ("text_", "fusion_", "multimodal_", "mlm_logits")
    for name, value in values.items():
        rows = mask.repeat(len(value) // len(mask), 1) if value.ndim == 3 else mask
        plain = name.split(".")[-1]
        case.compare({name: value}, label, rows if plain.startswith(words) and value.ndim == 3 else None)


def interpolation(case: Case) -> None:
    """Position tables `<side>to<side>_dim<D>` [1, 1 + g * g, D]."""
    for name, stored in case.outputs.items():
        side = round((stored.shape[1] - 1) ** 0.5)
        case.compare({name: resize_position_table(case.inputs[name][0], (side, side))[None]})


# ---------------------------------------------------------------------------------------------------------------------
# Training


def masking(config: Mapping, vocabulary: int) -> RandomMasking:
    """The library's, for the ids of the case: neither [CLS] nor padding is masked."""
    words = {f"word {index}": index for index in range(vocabulary)}
    names = {part: f"word {config['token_ids'][part]}" for part in ("cls", "mask", "pad")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, names["pad"])),
        **{f"{part}_token": name for part, name in names.items()},
    )
    return RandomMasking(tokenizer, config["yaml"].get("mlm_probability", 0.15))


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Logits of matching and similarities of one training forward."""
    found: dict[str, torch.Tensor] = {}
    contrast = model.contrast

    def observed(*args, **kwargs):
        result = contrast(*args, **kwargs)
        found.update(sim_i2t=result[1].detach(), sim_t2i=result[2].detach())
        return result

    model.contrast = observed
    handle = model.itm_head.register_forward_hook(
        lambda module, inputs, output: found.__setitem__("itm_logits", output.detach())
    )
    try:
        yield found
    finally:
        handle.remove()
        del model.contrast


def training_step(
    model: nn.Module, config: Mapping, inputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A forward in training, and beside it every stored value by the model's methods.

    Args:
        inputs: under the names of one step of one process.

    Returns:
        Values under the names of the stored ones, and the losses with their graph.
    """
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["image"]
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_ids": inputs.get("idx")}
    batch |= {"negative_image_index": inputs["neg_image_idx"], "negative_text_index": inputs["neg_text_idx"]}
    values: dict[str, torch.Tensor] = {}
    if isinstance(model, VlpAlbefForPreTraining):
        hide = masking(config, model.config.text_config.vocab_size)
        counted = mask * ids.ne(config["token_ids"]["pad"])
        masked, labels = hide(ids, counted, **{name: inputs[draw] for name, draw in DRAWS.items()})
        values |= {"mlm_input_ids": masked, "mlm_labels": labels}
        batch |= values
    queue = model.queue.image_features.clone(), model.queue.text_features.clone()
    model.train()
    with recording(model) as found:
        output = model(**batch)
    losses = {name: output.losses[term] for name, term in LOSSES.items() if term in output.losses}
    losses["loss_total"] = output.loss
    values |= found | {name: loss.detach() for name, loss in losses.items()}
    values |= {"image_feat": output.image_embeds.detach(), "text_feat": output.text_embeds.detach()}
    with torch.no_grad():
        values |= beside(model, batch, queue)
    return values, losses


def beside(
    model: nn.Module, batch: Mapping[str, torch.Tensor], queue: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a forward does not hand out; `queue`: image and text features [Q, E] that it found."""
    base, teacher, temperature = model.albef, model.teacher.albef, model.temperature()
    words, pixels = (batch["input_ids"], batch["attention_mask"]), batch["pixel_values"]
    image, text = base.encode_image(pixels)["image_embeds"], base.encode_text(*words)["text_embeds"]
    image_m, text_m = teacher.encode_image(pixels)["image_embeds"], teacher.encode_text(*words)["text_embeds"]
    images, texts = base.project_image(image), base.project_text(text)
    images_m, texts_m = teacher.project_image(image_m), teacher.project_text(text_m)
    to_image, to_text = torch.cat([images_m, queue[0]]), torch.cat([texts_m, queue[1]])
    size = len(images)
    negative_image, negative_text = batch["negative_image_index"], batch["negative_text_index"]
    values = {
        "image_embeds": image,
        "text_embeds": text,
        "image_embeds_m": image_m,
        "image_feat_m": images_m,
        "text_feat_m": texts_m,
        "sim_i2t_m": images_m @ to_text.T / temperature,
        "sim_t2i_m": texts_m @ to_image.T / temperature,
        "neg_weights_t2i": negative_weights((texts @ to_image.T / temperature)[:, :size], batch["image_ids"]),
        "neg_weights_i2t": negative_weights((images @ to_text.T / temperature)[:, :size], batch["image_ids"]),
        "fusion_pos": base.fuse(text, words[1], image),
        "fusion_neg": base.fuse(
            torch.cat([text, text[negative_text]]),
            torch.cat([words[1], words[1][negative_text]]),
            torch.cat([image[negative_image], image]),
        ),
    }
    if "mlm_input_ids" in batch:
        masked = batch["mlm_input_ids"], words[1]
        values["mlm_logits"] = model.mlm_head(base(*masked, image_embeds=image).last_hidden_state)
        values["mlm_logits_m"] = model.teacher.mlm_head(teacher(*masked, image_embeds=image_m).last_hidden_state)
    return values


def compare_step(
    case: Case,
    values: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    prefix: str = "",
    label: str = "",
) -> None:
    """Compare the values of a step, whose stored ones have `prefix` in front."""
    mask, plain = inputs["attention_mask"], dict(values)
    if "fusion_neg" in plain:
        both = torch.cat([mask, mask[inputs["neg_text_idx"]]])
        case.compare({f"{prefix}fusion_neg": plain.pop("fusion_neg")}, label, both)
    compare_states(case, {prefix + name: value for name, value in plain.items()}, mask, label)


def left_behind(checkpoint: Checkpoint, model: nn.Module, names, prefix: str = "") -> dict[str, torch.Tensor]:
    """Weights, queues and momentum copies of a model after a step, as far as they are among `names`, which begin with `<prefix>after.`."""
    state, start = model.state_dict(), f"{prefix}after."
    return {
        name: checkpoint.to_original(name.removeprefix(start), state).clone()
        for name in names
        if name.startswith(start)
    }


def gradients(checkpoint: Checkpoint, model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Of a loss, under the original's names."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, [parameter for _, parameter in named], retain_graph=True, allow_unused=True)
    ours = {name: gradient for (name, _), gradient in zip(named, found, strict=True)}
    return {name: checkpoint.to_original(name, ours) for name in checkpoint.original}


def training(case: Case) -> None:
    """One training forward of pre-training or retrieval, with the gradients of its losses and what it leaves."""
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config)
        values, losses = training_step(model, case.config, case.inputs)
        compare_step(case, values, case.inputs, label=label)
        case.compare(left_behind(checkpoint, model, case.outputs), label)
        for section in case.gradients:
            case.compare_gradients(section, gradients(checkpoint, model, losses[section]), label)


def training_on_ranks(case: Case) -> None:
    """One training forward on several processes with inputs `rank<n>.<name>`; gradients are the mean of theirs."""
    from tests.parity.albef_rank import on_ranks  # imports this module

    paths = case.weight_files()
    for path in paths:
        label = f"{path.name}: " if len(paths) > 1 else ""
        found = on_ranks(path, case.config, case.inputs, list(case.outputs))
        for number, (values, _) in enumerate(found):
            own = rank_inputs(case.inputs, number)
            compare_step(case, values, own, f"rank{number}.", label)
            left = {f"rank{number}.{name}": value for name, value in values.items() if name.startswith("after.")}
            case.compare(left, label)
        for section in case.gradients:
            names = found[0][1]
            mean = {name: torch.stack([gradient[name] for _, gradient in found]).mean(dim=0) for name in names}
            case.compare_gradients(section, dict.fromkeys(case.gradients[section]) | mean, label)


def rank_inputs(inputs: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """The inputs of one process under their plain names."""
    start = f"rank{number}."
    return {name.removeprefix(start): value for name, value in inputs.items() if name.startswith(start)}


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer steps


def rate(config: Mapping) -> float:
    """The project's learning rate at the scheduler's time of the case: hundreds of steps, then epochs behind the warm-up."""
    plan, time = config["yaml"]["schedular"], config["options"]["sched_t"]
    lr, warmup = float(plan["lr"]), int(plan["warmup_epochs"])
    steps = 100 * (warmup + 1)  # of an epoch, enough for the warm-up
    return lr * rate_factor(
        100 * time + 1 if time < warmup else (time - warmup) * steps + (100 * warmup + 1) * (time == warmup),
        name="cosine_epochs",
        total_steps=int(plan["epochs"]) * steps,
        warmup_steps=100 * warmup,
        start_factor=float(plan["warmup_lr"]) / lr,
        end_factor=float(plan["min_lr"]) / lr,
        epoch_steps=steps,
    )


def training_steps(case: Case) -> None:
    """Optimizer steps one after the other, each with its inputs `<name>_step<n>`."""
    options = case.config["yaml"]["optimizer"]
    steps = sorted({int(name.rpartition("_step")[2]) for name in case.inputs})
    for checkpoint, label in checkpoints(case):
        model = checkpoint.build(case.config)
        lr = rate(case.config)
        groups = parameter_groups(model, lr, float(options["weight_decay"]), decay="all", no_decay=UNDECAYED)
        case.compare({"lr": torch.tensor(lr)} | counts(checkpoint, groups), label)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
        for step in steps:
            prefix, ending = f"step{step}.", f"_step{step}"
            inputs = {name.removesuffix(ending): value for name, value in case.inputs.items() if name.endswith(ending)}
            values, losses = training_step(model, case.config, inputs)
            compare_step(case, values, inputs, prefix, label)
            for section in [section for section in case.gradients if section.endswith(ending)]:
                found = gradients(checkpoint, model, losses[section.removesuffix(ending)])
                case.compare_gradients(section, found, label)
            optimizer.zero_grad()
            losses["loss_total"].backward()
            optimizer.step()
            case.compare(left_behind(checkpoint, model, case.outputs, prefix), label)


def counts(checkpoint: Checkpoint, groups: list[dict]) -> dict[str, torch.Tensor]:
    """How many of the original's parameters decay, and how many do not."""
    found = {"n_decay": 0, "n_no_decay": 0}
    for group in groups:
        names = set(group["names"])
        held = [name for name in checkpoint.original if names & set(forward_names(name, checkpoint.table))]
        found["n_decay" if group["weight_decay"] else "n_no_decay"] += len(held)
    return {name: torch.tensor(number) for name, number in found.items()}
