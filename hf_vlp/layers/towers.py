"""Towers of models that embed two sides apart: any encoder of transformers or timm, a tower alone, and the check that the sides fit."""

import inspect

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModel

from hf_vlp.layers.packing import reach_of, run_by_length


def build_tower(config, pooler: bool) -> PreTrainedModel:
    """The model of a tower's configuration, without an unused pooling layer where its class can be built without one."""
    if not pooler:
        model_class = AutoModel._model_mapping.get(type(config), None)
        if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
            return model_class._from_config(config, add_pooling_layer=False)
    return AutoModel.from_config(config)


def tower_width(tower: PreTrainedModel) -> int:
    """Width D of a tower's states, as its configuration or its timm model tells; of the last stage where stages differ."""
    if hasattr(tower, "timm_model"):
        return tower.timm_model.num_features
    return tower.config.hidden_size if hasattr(tower.config, "hidden_size") else tower.config.hidden_sizes[-1]


class LoadsOutOfAPair:
    """Mixed into a tower in front of its `PreTrainedModel`: it also loads its part out of a folder that holds the whole model.

    pair_prefix: what the pair's weights are called below in a head's folder. pair_parts: how names of parts begin, in pairs and heads.
    """

    pair_prefix: str
    pair_parts: tuple[str, ...]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        others = rf"(?!{cls.base_model_prefix}\.)({'|'.join(cls.pair_parts)})"
        cls._keys_to_ignore_on_load_unexpected = [rf"^({cls.pair_prefix}\.)?{others}"]

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = None, **kwargs):
        """As in transformers; weights under the pair's prefix or under the tower's name in the whole model are found as well."""
        prefix = rf"^(?:{cls.pair_prefix}\.)?{cls.base_model_prefix}\."
        return super().from_pretrained(*args, key_mapping={prefix: "", **(key_mapping or {})}, **kwargs)

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As in transformers, under the tower's own names: a mapping used in loading is not undone unless asked for."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)


def token_states(
    tower: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, seen: torch.Tensor | None
) -> torch.Tensor:
    """`last_hidden_state` [B, L, D] of a text tower, most of the padding left out: texts of similar length run together.

    Exact at real tokens; what stands at padding is not defined. Only on a CPU, where the time goes with the tokens, and outside of
    traced graphs, whose shapes must not depend on lengths; elsewhere all run at once.

    Args:
        input_ids: [B, L]. attention_mask: [B, L] or None, 1 at tokens whose states are wanted.
        seen: [B, L] or None, what the tower attends to.
    """
    if attention_mask is None or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return tower(input_ids=input_ids, attention_mask=seen).last_hidden_state

    def run(rows: torch.Tensor | slice, reach: torch.Tensor) -> torch.Tensor:
        longest = int(reach.max())
        mask = None if seen is None else seen[rows, :longest]
        return tower(input_ids=input_ids[rows, :longest], attention_mask=mask).last_hidden_state

    return run_by_length(reach_of(attention_mask), input_ids.shape[1], run)


def require_pairs(**sides: torch.Tensor | None) -> None:
    """Raise a ValueError unless all that is given has the same number of rows."""
    rows = {name: len(tensor) for name, tensor in sides.items() if tensor is not None}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{number} {name}" for name, number in rows.items())
        raise ValueError(
            f"row i of the texts belongs to row i of the images, got {counts}: give the same number of each"
        )


def require_shape(shape: tuple[int, ...], **tensors: torch.Tensor | None) -> None:
    """Raise a ValueError unless all that is given has this shape."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} must have the shape {list(shape)}, as the rest of the batch, got {list(tensor.shape)}"
            )


def fill_tower(model: PreTrainedModel, name: str, tower: str | PreTrainedModel) -> None:
    """Give the part `name` of a model the weights of a pretrained encoder: a folder, a Hub id or a model.

    Raises:
        ValueError: the model has no such part, or the weights are not those of its class; a pooling layer left unused is allowed.
    """
    part = getattr(model, name, None)
    if not isinstance(part, PreTrainedModel):
        towers = [key for key, child in model.named_children() if isinstance(child, PreTrainedModel)]
        raise ValueError(f"{type(model).__name__} has no tower {name!r}; it has {', '.join(towers) or 'none'}")
    source = AutoModel.from_pretrained(tower, dtype=torch.float32) if isinstance(tower, str) else tower
    try:
        missing, unexpected = part.load_state_dict(source.state_dict(), strict=False)
    except RuntimeError as error:  # other sizes; torch lists them
        raise ValueError(
            f"the {type(source).__name__} given as {name} has other sizes than this model's: "
            f"{' '.join(str(error).split())}"
        ) from error
    unexpected = [key for key in unexpected if not key.startswith("pooler.")]
    if missing or unexpected:
        raise ValueError(
            f"the {type(source).__name__} given as {name} does not fill a {type(part).__name__}: it lacks "
            f"{', '.join(missing[:5]) or 'nothing'} and has besides {', '.join(unexpected[:5]) or 'nothing'}; "
            "give the bare encoder, as AutoModel loads it"
        )


@torch.no_grad()
def take_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], needed: tuple[str, ...], source: str) -> None:
    """Copy `weights`, under the names of the model's parameters, into it.

    Args:
        needed: how the names begin of parameters that must all be among them.
        source: what they are of, for messages.

    Raises:
        ValueError: a weight that the model has not, or has in another size, or one that is lacking; nothing is copied then.
    """
    held = dict(model.named_parameters())
    wrong = [
        f"{name} {list(weight.shape)} for {list(held[name].shape) if name in held else 'none'}"
        for name, weight in weights.items()
        if name not in held or held[name].shape != weight.shape
    ]
    lacking = [name for name in held if name.startswith(needed) and name not in weights]
    if wrong or lacking:
        raise ValueError(f"{source} has other sizes than this model: {', '.join((wrong + lacking)[:5])}")
    for name, weight in weights.items():
        held[name].copy_(weight)
