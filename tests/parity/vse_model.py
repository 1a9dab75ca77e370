"""Cases with VSE-infinity's weights (checkpoint, converter, our classes, stored outputs), and of its two kernels alone.

Everything comes from the folder: sizes from the weights, heads and graph from config.json, runs to make from the names of the stored
tensors and gradient sections.
"""

import copy
import re
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from conversion.from_vse import build_model, convert_state_dict, load_pooling, mask_of, model_inputs, read_original
from conversion.tables import ConversionError, Drop, Rename, find_row, original_value, revert
from conversion.vse_layouts import COPIES, vse_table, without_copies
from hf_vlp.inputs.grid_augmentation import GridDropping
from hf_vlp.layers.pooling import GeneralizedPooling, sinusoids, unit_rows
from hf_vlp.models.vse.modeling_vse import NORM_EPS, VlpVseForPreTraining, VlpVseModel
from hf_vlp.objectives.triplet import triplet_loss
from tests.parity.harness import Case

FORMS = {"sum_of_hinges": 0.0, "max_violation": 1.0}  # of the loss -> share of the hardest negatives
SECTION = re.compile(r"loss\.(?P<mode>eval|train)\.(?P<form>\w+?)(\|fixed_blocks=(?P<stages>\d+))?")
AFTER_TRAIN = "after_train_forward."
ALL_STAGES = 4
# Names of intermediate values <-> the modules whose results they are; of the first two that a model has.
INTERMEDIATES = [
    Rename("img.fc", "visual_projection"),
    Rename("img.image_encoder.fc", "visual_projection"),
    Rename("img.mlp", "region_mlp"),
    Rename("img.backbone.top", "vision_model.resnet.layer4"),
    Rename("img.backbone.base", "vision_model.resnet.layer3"),
    # the CNN as sequences of modules: numbers in place of names
    Rename("img.backbone.top.0", "vision_model.resnet.layer4"),
    Rename("img.backbone.base.0", "vision_model.resnet.conv1"),
    Rename("img.backbone.base.1", "vision_model.resnet.bn1"),
    Rename("img.backbone.base.4", "vision_model.resnet.layer1"),
    Rename("img.backbone.base.5", "vision_model.resnet.layer2"),
    Rename("img.backbone.base.6", "vision_model.resnet.layer3"),
    Rename("img.backbone", "vision_model"),
    Rename("img.backbone.*", "vision_model.*"),
    Rename("txt.bert", "text_model"),
    Rename("txt.bert.*", "text_model.*"),
    Rename("txt.linear", "text_projection"),
    Rename("txt.embed", "text_model.embeddings"),
    Rename("txt.rnn_mean", "text_model.gru"),
]
POOLINGS = {"img.gpool": "visual_pooling", "img.image_encoder.gpool": "visual_pooling", "txt.gpool": "text_pooling"}


class Checkpoint:
    """A weight file of the original, converted strictly; models of it, and its names and values by way of the table.

    unused: what the file holds and ours does without, under the original's names.
    """

    def __init__(self, path, fields: dict):
        original = read_original(path)
        self.options = original.options | fields.get("opt", {})
        self.config, self.state = convert_state_dict(original.state, self.options, fields)
        self.table = vse_table(self.config)
        rows = {name: find_row(name, self.table) for name in without_copies(original.state)}
        self.unused = {name: original.state[name] for name, row in rows.items() if isinstance(row[0], Drop)}

    def model(self, train: bool = False) -> VlpVseForPreTraining:
        """A new model of these weights."""
        return build_model(self.config, self.state, torch.float32, VlpVseForPreTraining).train(train)

    def original(self, name: str, ours: Mapping[str, torch.Tensor | None]) -> torch.Tensor | None:
        """One value under the original's name from values under names of `VlpVseForPreTraining`; None where ours does without.

        Raises:
            ConversionError: the original has no such name.
        """
        bare = {ours_name.removeprefix("vse."): value for ours_name, value in ours.items()}
        return original_value(plain(name), bare, self.table)


def plain(name: str) -> str:
    """A name of the original without the `module.` of DataParallel; of a second copy, the first one's."""
    bare = re.sub(r"^(img_enc|txt_enc)\.module\.", r"\1.", name)
    copy_of = find_row(bare, COPIES)
    return bare if copy_of is None else copy_of[1][0]


def checkpoints(case: Case) -> Iterator[tuple[Checkpoint, str]]:
    """Every weight file of the folder, and a label for its lines if there are several."""
    paths = case.weight_files()
    for path in paths:
        yield Checkpoint(path, case.config), f"{path.name}: " if len(paths) > 1 else ""


def model(case: Case) -> None:
    """Forward, intermediates, losses, gradients, batch-norm statistics: each mode that the folder has values of."""
    for checkpoint, label in checkpoints(case):
        for mode in ("eval", "train"):
            names = {name for name in case.outputs if name.startswith((f"{mode}.", f"loss.{mode}."))}
            sections = [
                section for section in case.gradients if (match := SECTION.fullmatch(section)) and match["mode"] == mode
            ]
            if names:
                batch = batch_of(case, checkpoint.model().vse, mode)
                case.compare(forward_values(checkpoint.model(mode == "train"), batch, mode, names), label)
            for section in sections:
                case.compare_gradients(section, gradients(case, checkpoint, section), label)
        case.compare(after_train_forward(case, checkpoint), label)


def batch_of(case: Case, vse: VlpVseModel, mode: str, step: int | None = None) -> dict[str, torch.Tensor]:
    """Arguments of `forward`; in training with the cells that the recorded draws keep, those of `step` if there are several."""
    batch = model_inputs(case.inputs)
    if mode == "train" and "rand_list_1" in case.inputs:
        of_cells, of_images = (
            case.inputs[name] if step is None else case.inputs[name][step] for name in ("rand_list_1", "rand_list_2")
        )
        images, cells = of_cells.shape
        batch["grid_mask"] = GridDropping(cells)(images, cell_draws=of_cells, image_draws=of_images)
    return batch


def forward_values(
    training_model: VlpVseForPreTraining, batch: dict[str, torch.Tensor], mode: str, wanted: set[str]
) -> dict[str, torch.Tensor]:
    """Named values of a forward under the original's names, and the losses."""
    vse, values, pooled = training_model.vse, {}, {}
    hooks = [hook for name in wanted if (hook := record(vse, name.removeprefix(f"{mode}."), values))]
    hooks += [record_pooling(vse.get_submodule(module), module, pooled) for module in set(POOLINGS.values())]
    with torch.no_grad():
        output = vse(**batch)
    for hook in hooks:
        hook.remove()
    for name, module in POOLINGS.items():
        values |= {f"{name}.{part}": value for part, value in pooled[module].items()}
    if "txt.rnn_mean" in values:
        values["txt.rnn_mean"] = values["txt.rnn_mean"][:, : batch["attention_mask"].sum(dim=1).max()]
    if "img.backbone" in values:
        values["img.backbone"] = values["img.backbone"].flatten(2).transpose(1, 2)
    if "grid_mask" in batch and "img.image_encoder.fc" in values:
        padding = vse.visual_projection.bias.detach()  # what the projection makes of the original's zero rows
        values["img.image_encoder.fc"] = compacted(values["img.image_encoder.fc"], batch["grid_mask"], padding)
    values |= {"img_emb": output.image_embeds, "cap_emb": output.text_embeds, "scores": output.logits_per_image}
    found = {f"{mode}.{name}": value for name, value in values.items()}
    for form in FORMS:
        found[f"loss.{mode}.{form}"] = loss_of(copy.deepcopy(training_model), batch, form).detach()
    return found


def record(vse: VlpVseModel, name: str, values: dict):
    """A hook that puts the result of an intermediate value's module into `values`; None if there is no such module."""
    found = find_row(name, INTERMEDIATES)
    if found is None or found[1][0] not in dict(vse.named_modules()):
        return None

    def keep(module, arguments, result):
        result = getattr(result, "last_hidden_state", result)
        # cloned: a later in-place activation may overwrite the tensor
        values[name] = (result[0] if isinstance(result, tuple) else result).clone()

    return vse.get_submodule(found[1][0]).register_forward_hook(keep)


def record_pooling(pooling: GeneralizedPooling, key: str, pooled: dict):
    """A hook that puts result, weights and scores of a pooling into `pooled`, cut to the longest set as in the original."""

    def keep(module, arguments, result):
        features, mask = arguments
        lengths = torch.full((len(features),), features.shape[1]) if mask is None else mask.sum(dim=1)
        longest = int(lengths.max())
        scores = module.scores(lengths, longest)
        pooled[key] = {
            "pooled": result[0],
            "weights": result[1][:, :longest].unsqueeze(-1),
            "linear": scores.unsqueeze(-1),
        }

    return pooling.register_forward_hook(keep)


def compacted(features: torch.Tensor, mask: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """`features` [B, P, E] where `mask` [B, P] is 1, moved to the front of [B, longest, E] with `padding` [E] behind."""
    kept = [row[keep.bool()] for row, keep in zip(features, mask)]
    rest = [padding.expand(int(mask.sum(dim=1).max()) - len(row), -1) for row in kept]
    return torch.stack([torch.cat(parts) for parts in zip(kept, rest)])


def loss_of(training_model: VlpVseForPreTraining, batch: dict[str, torch.Tensor], form: str) -> torch.Tensor:
    """The loss in one of FORMS."""
    training_model.hardest_negatives = FORMS[form]
    return training_model(**batch).loss


def gradients(case: Case, checkpoint: Checkpoint, section: str) -> dict[str, torch.Tensor | None]:
    """Gradients of a named loss under the original's names, for the names that the section has and the table knows."""
    match = SECTION.fullmatch(section)
    training_model = checkpoint.model(match["mode"] == "train")
    if match["stages"] is not None:
        training_model.freeze_stages(int(match["stages"]))
    loss_of(training_model, batch_of(case, training_model.vse, match["mode"]), match["form"]).backward()
    ours, found = {name: parameter.grad for name, parameter in training_model.named_parameters()}, {}
    for name in case.gradients[section]:
        try:
            found[name] = checkpoint.original(name, ours)
        except ConversionError:
            continue  # stays unaccounted for
    return found


@torch.no_grad()
def after_train_forward(case: Case, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The image encoder's buffers after one forward in train mode, and what freezing and training do to the CNN's."""
    if "images" not in case.inputs:
        return {}
    training_model = checkpoint.model(train=True)
    before = statistics(training_model)
    training_model(**batch_of(case, training_model.vse, "train"))
    state = {name.removeprefix("vse."): tensor for name, tensor in training_model.state_dict().items()}
    found = {}
    for name in [name for name in case.outputs if name.startswith(AFTER_TRAIN)]:
        ours = plain("img_enc." + name.removeprefix(AFTER_TRAIN))
        values = revert(state, checkpoint.table) | checkpoint.unused
        if ours in values:
            found[name] = values[ours]
    if checkpoint.config.vision_config is not None:
        after = statistics(training_model)
        unchanged = all(torch.equal(before[name], after[name]) for name in before)
        training_model.freeze_stages(ALL_STAGES)
        trainable = sum(parameter.requires_grad for parameter in training_model.vse.vision_model.parameters())
        found["check.bn_stats_unchanged_by_training_forward"] = torch.tensor(int(unchanged))
        found["count.trainable_backbone_tensors_after_freeze"] = torch.tensor(trainable)
    return found


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all buffers."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def gpo(case: Case) -> None:
    """The pooling alone: `features` [B, K, D] and `lengths` [B] to `pooled`, `weights`, and the gradients of sum(pooled^2)."""
    for path in case.weight_files():
        pooling, features = load_pooling(path), case.inputs["features"].clone().requires_grad_()
        lengths = case.inputs["lengths"].long()
        longest = int(lengths.max())
        pooled, weights = pooling(features, mask_of(lengths, features.shape[1]))
        loss = pooled.square().sum()
        loss.backward()
        case.compare(
            {
                "pooled": pooled,
                "weights": weights[:, :longest].unsqueeze(-1),
                "loss": loss,
                "grad_features": features.grad,
                "pe": sinusoids(longest, pooling.gru.input_size),
            }
        )
        ours = {name: parameter.grad for name, parameter in pooling.named_parameters()}
        for section in case.gradients:
            case.compare_gradients(section, ours)


def losses(case: Case) -> None:
    """Embeddings `img` and `cap` [B, E] to both hinge losses and their gradients; `l2norm_probe` to unit rows."""
    values = {"scores": case.inputs["img"] @ case.inputs["cap"].T}
    for form, hardest in FORMS.items():
        images, texts = (case.inputs[name].clone().requires_grad_() for name in ("img", "cap"))
        loss = triplet_loss(images, texts, margin=case.config.get("margin", 0.2), hardest=hardest)
        loss.backward()
        values[f"loss.{form}"] = loss
        values |= {f"grad.{form}.img": images.grad, f"grad.{form}.cap": texts.grad}
    if "l2norm_probe" in case.inputs:
        values["l2norm_of_probe"] = unit_rows(case.inputs["l2norm_probe"], NORM_EPS)
    case.compare(values)
