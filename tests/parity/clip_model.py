"""Cases with CLIP weights (checkpoint, converter, our classes, stored outputs) and with the statistics of fresh ones.

Everything comes from the folder: sizes from the weights, heads from config.json where it tells them, runs to make from
the names of the stored tensors and gradient sections.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel

import hf_vlp  # noqa: F401  the Auto classes know CLIP from here on
from conversion.checkpoints import read_checkpoint
from conversion.clip_layouts import clip_table
from conversion.from_clip import build_model, convert_state_dict, rounded
from conversion.tables import ConversionError, Rename, find_row, original_value, revert
from hf_vlp.evaluation.zero_shot import classifier_from_features, classify, top_k_accuracy
from hf_vlp.layers.logit_scale import LogitScale
from hf_vlp.models.clip.configuration_clip import (
    VlpClipConfig,
    VlpClipResNetConfig,
    VlpClipTextConfig,
    VlpClipVisionConfig,
)
from hf_vlp.models.clip.modeling_clip import VlpClipForPreTraining, VlpClipModel
from tests.parity.harness import Case, CaseError

# Prefix of tensors and gradient sections -> arguments of `Checkpoint.model`: rounding, half, train. No prefix
# is what the original's loader gives, so a float32 checkpoint is rounded there too.
RUNS = {
    "": (True, False, False),
    "rounded.": (True, False, False),
    "exact.": (False, False, False),
    "train.": (False, False, True),
    "fp16.": (True, True, False),
}
AFTER_TRAIN = "after_train_forward."
# Names of intermediate values <-> the modules whose results they are.
INTERMEDIATES = [
    Rename("vision.patch_embed", "vision_model.embeddings.patch_embedding"),
    Rename("vision.ln_pre", "vision_model.pre_norm"),
    Rename("vision.block.{}", "vision_model.encoder.layers.{}"),
    Rename("vision.pooled", "vision_model.post_norm"),
    Rename("vision.stem", "vision_model.resnet.pool"),
    Rename("vision.layer{}", "vision_model.resnet.layer{}"),
    Rename("text.embeddings", "text_model.embeddings"),
    Rename("text.block.{}", "text_model.encoder.layers.{}"),
    Rename("text.ln_final", "text_model.final_norm"),
]


class Checkpoint:
    """A weight file of the original, converted strictly; models of it in any run."""

    def __init__(self, path, fields: dict, pooling: str = "largest_id"):
        self.config, self.state = convert_state_dict(
            read_checkpoint(path),
            hidden_act="quick_gelu",
            pooling=pooling,
            vision_heads=fields.get("vision_heads"),
            text_heads=fields.get("transformer_heads"),
        )
        self.config.logit_scale_max = None  # the limit belongs to training; the released forward has none
        self.table = clip_table(self.config)

    def model(self, rounding: bool = True, half: bool = False, train: bool = False) -> VlpClipForPreTraining:
        """A new model of these weights.

        `rounding`: float32 weights rounded as the original loader rounds them. `half`: computing in half precision as
        the original does, with norms and the scale in float32.
        """
        state = rounded(self.config, self.state) if rounding else self.state
        ours = build_model(self.config, state, torch.float32, VlpClipForPreTraining).train(train)
        for module in ours.modules() if half else ():
            if not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, LogitScale)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.half()
        return ours


def checkpoints(case: Case) -> Iterator[tuple[Checkpoint, str]]:
    """Every weight file of the folder, and a label for its lines if there are several."""
    paths = case.weight_files()
    for path in paths:
        yield Checkpoint(path, case.config), f"{path.name}: " if len(paths) > 1 else ""


def model(case: Case) -> None:
    """Forward, intermediates, losses, gradients, batch-norm statistics: each run that the folder has values of."""
    for checkpoint, label in checkpoints(case):
        compare_runs(case, checkpoint, label)


def compare_runs(case: Case, checkpoint: Checkpoint, label: str = "") -> None:
    """The runs of RUNS that tensors or gradient sections of the folder belong to."""
    names = [*case.outputs, *case.gradients]
    for prefix, options in RUNS.items():
        wanted = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if not prefix:
            wanted = {name for name in wanted if not name.startswith((*filter(None, RUNS), AFTER_TRAIN))}
        trained = prefix == "train." and any(name.startswith(AFTER_TRAIN) for name in case.outputs)
        if not wanted and not trained:
            continue
        ours = checkpoint.model(*options)
        found = forward_values(copy.deepcopy(ours), case.inputs, wanted)
        case.compare({prefix + name: value for name, value in found.items()}, label)
        for section in case.gradients:
            loss = section.removeprefix(prefix)
            if section == prefix + loss and loss in ("loss.total", "loss.image", "loss.text"):
                case.compare_gradients(section, gradients(copy.deepcopy(ours), case, checkpoint, section, loss), label)
        if trained:
            case.compare(statistics_after_forward(ours, case, checkpoint), label)


def forward_values(
    model: VlpClipForPreTraining, inputs: dict[str, torch.Tensor], wanted: set[str]
) -> dict[str, torch.Tensor]:
    """Named values of a forward, under the original's names, of whichever sides the inputs have.

    `image` [B, 3, H, W] and `text` [B, L]. The towers run whole for the intermediate values and the logits; features
    and loss.total take the shorter way of training, in which the last block sees the pooled row only.
    """
    image, text, clip, values = inputs.get("image"), inputs.get("text"), model.clip, {}
    with torch.no_grad():
        hooks = [hook for name in wanted if (hook := record(clip, name, values))]
        if image is not None:
            clip.vision_model(image)
        if text is not None:
            values["text.pooled"] = clip.text_model(text).pooler_output
            values["text.pool_index"] = clip.text_model.end_of_text(text)
        for hook in hooks:
            hook.remove()
        if image is not None:
            values["image_features"] = clip.encode_image(image)
        if text is not None:
            values["text_features"] = clip.encode_text(text)
        if image is not None and text is not None:
            output = clip(input_ids=text, pixel_values=image)
            values["logits_per_image"], values["logits_per_text"] = output.logits_per_image, output.logits_per_text
        if image is not None and text is not None and len(image) == len(text):
            values |= losses(model, inputs)
    return {name: value.float() if value.is_floating_point() else value for name, value in values.items()}


def record(clip: VlpClipModel, name: str, values: dict):
    """A hook that puts the result of an intermediate value's module into `values`; None if there is no such module."""
    found = find_row(name, INTERMEDIATES)
    if found is None or found[1][0] not in dict(clip.named_modules()):
        return None
    # cloned: a later in-place activation may overwrite the tensor
    return clip.get_submodule(found[1][0]).register_forward_hook(
        lambda module, arguments, result: values.__setitem__(name, result.clone())
    )


def losses(model: VlpClipForPreTraining, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss of pre-training, and its two halves from the embeddings that it returns."""
    output = model(input_ids=inputs["text"], pixel_values=inputs["image"])
    logits = model.clip.logit_scale() * output.image_embeds.float() @ output.text_embeds.float().T
    targets = torch.arange(len(logits))
    return {
        "loss.total": output.loss,
        "loss.image": cross_entropy(logits, targets),
        "loss.text": cross_entropy(logits.T, targets),
    }


def gradients(model: VlpClipForPreTraining, case: Case, checkpoint: Checkpoint, section: str, loss: str) -> dict:
    """Gradients of a named loss under the original's names, for the names that the section has and the table knows."""
    losses(model, case.inputs)[loss].backward()
    ours = {name.removeprefix("clip."): parameter.grad for name, parameter in model.named_parameters()}
    found = {}
    for name in case.gradients[section]:
        try:
            found[name] = original_value(name, ours, checkpoint.table)
        except ConversionError:
            continue  # stays unaccounted for
    return found


def statistics_after_forward(
    model: VlpClipForPreTraining, case: Case, checkpoint: Checkpoint
) -> dict[str, torch.Tensor]:
    """The original's buffers after one forward of a model in train mode; all belong to the image tower."""
    if "image" not in case.inputs:
        return {}
    with torch.no_grad():
        model.clip.vision_model(case.inputs["image"])
    state = {name.removeprefix("clip."): tensor for name, tensor in model.state_dict().items()}
    return {AFTER_TRAIN + name: tensor for name, tensor in revert(state, checkpoint.table).items()}


def zeroshot(case: Case) -> None:
    """Zero-shot: `prompt_tokens` [K, T, L] make the classifier of `image` [N, 3, H, W] with `target` [N]."""
    for checkpoint, label in checkpoints(case):
        compare_runs(case, checkpoint, label)
        clip, values = checkpoint.model().clip, {}
        with torch.no_grad():
            if "prompt_tokens" in case.inputs:
                classes, templates, length = case.inputs["prompt_tokens"].shape
                prompts = clip.encode_text(case.inputs["prompt_tokens"].reshape(-1, length))
                values["classifier"] = classifier_from_features(prompts.unflatten(0, (classes, templates)))
            if "image" in case.inputs and "classifier" in values:
                logits = classify(clip.encode_image(case.inputs["image"]), values["classifier"])
                values["logits"], values["probs"] = logits, logits.softmax(dim=-1)
                values["top5_indices"] = logits.topk(min(5, logits.shape[1]), dim=1).indices
                if "target" in case.inputs:
                    for k in (1, 5):
                        values[f"top{k}_percent"] = torch.tensor(top_k_accuracy(logits, case.inputs["target"], k))
        case.compare(values, label)


def initialisation(case: Case) -> None:
    """Fresh weights: shapes and constants exactly, the spread of large random tensors within 10 %."""
    stored = case.json("init_stats.json")
    config = config_from_fields(case.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = AutoModel.from_config(config)
    ours = revert(fresh.state_dict(), clip_table(config))
    for name, statistics in stored.items():
        entry = f"init_stats.json: {name}"
        case.expect({entry: statistics})
        unknown = set(statistics) - {"shape", "mean", "std", "min", "max"}
        if name in ours and not unknown:
            compare_statistics(case, entry, ours[name], statistics)


def compare_statistics(case: Case, entry: str, tensor: torch.Tensor, stored: dict) -> None:
    """One fresh tensor against {shape, mean, std, min, max}; small random tensors by shape alone."""
    if list(tensor.shape) != stored["shape"]:
        case.settle(entry, False, note=f"shape {list(tensor.shape)} instead of {stored['shape']}")
    elif stored["std"] == 0 or stored["min"] == stored["max"]:
        values = [stored[name] for name in ("mean", "min", "max") if name in stored]
        difference = max((tensor.double() - value).abs().max().item() for value in values)
        case.settle(entry, difference == 0, difference, 0.0, "constant")
    elif tensor.numel() > 2000:
        difference = abs(tensor.double().std().item() - stored["std"])
        case.settle(entry, difference <= 0.1 * stored["std"], difference, 0.1 * stored["std"], "standard deviation")
    elif tensor.double().std().item() == 0:
        case.settle(entry, False, note="constant instead of random")
    else:
        case.settle(entry, True, note=f"shape only: random with {tensor.numel()} elements")


def config_from_fields(fields: dict) -> VlpClipConfig:
    """Our configuration for the constructor arguments of the original, as config.json has them.

    Raises:
        CaseError: a field is missing.
    """
    try:
        width, layers, size = fields["vision_width"], fields["vision_layers"], fields["image_resolution"]
        text = VlpClipTextConfig(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["transformer_width"],
            intermediate_size=4 * fields["transformer_width"],
            num_hidden_layers=fields["transformer_layers"],
            num_attention_heads=fields.get("transformer_heads") or max(1, fields["transformer_width"] // 64),
            max_position_embeddings=fields["context_length"],
            bos_token_id=fields["vocab_size"] - 2,
            eos_token_id=fields["vocab_size"] - 1,
            pad_token_id=fields["vocab_size"] - 1,
        )
        if isinstance(layers, list):
            heads = fields.get("vision_heads") or max(1, width * 32 // 64)
            vision = VlpClipResNetConfig(
                width=width,
                layers=layers,
                num_attention_heads=heads,
                image_size=size,
                projection_dim=fields["embed_dim"],
            )
        else:
            vision = VlpClipVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=fields.get("vision_heads") or max(1, width // 64),
                image_size=size,
                patch_size=fields["vision_patch_size"],
            )
        return VlpClipConfig(text_config=text, vision_config=vision, projection_dim=fields["embed_dim"])
    except KeyError as error:
        raise CaseError(f"config.json does not tell {error.args[0]}") from error
