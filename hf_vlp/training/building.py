"""The configuration, the precision and the model that a recipe asks for.

A configuration is flat, or holds one of its text side and one of its image side.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForPreTraining, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_vlp.training.recipe import Recipe, RecipeError


def build_config(recipe: Recipe) -> PreTrainedConfig:
    """The saved or new configuration, with the recipe's fields."""
    if recipe.model.from_pretrained is None:
        if recipe.model.model_type not in CONFIG_MAPPING:
            nearest = difflib.get_close_matches(recipe.model.model_type, [*CONFIG_MAPPING.keys()], n=1, cutoff=0)[0]
            raise RecipeError(f"model.model_type = {recipe.model.model_type!r} is unknown; the nearest is {nearest!r}")
        try:
            config = AutoConfig.for_model(recipe.model.model_type, **recipe.model.config)
        except (AttributeError, TypeError, ValueError, StrictDataclassError) as error:
            raise RecipeError(f"model.config: {' '.join(str(error).split())}") from error
        refuse_ignored(config, recipe.model.config)
        return config
    config = AutoConfig.from_pretrained(recipe.model.from_pretrained)
    override(config, recipe.model.config)
    return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that tells vocabulary and longest text: that of the text side, or a flat one itself."""
    return getattr(config, "text_config", config)


def image_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The part that tells the size of images: the configuration of the image side, or a flat one itself; None where it sees regions."""
    flat = config if hasattr(config, "image_size") else None
    return getattr(config, "vision_config", flat)


def image_size(config: PreTrainedConfig) -> int | None:
    """The side of the images that a model sees, None where its configuration tells none."""
    return getattr(image_config(config), "image_size", None)


def override(config: PreTrainedConfig, values: dict, where: str = "model.config") -> None:
    """Sets fields of a saved configuration and of those inside it."""
    for name, value in values.items():
        if name == "model_type" and value != config.model_type:
            raise RecipeError(
                f"{where}.model_type = {value!r}: the saved model has {config.model_type!r}, leave it out"
            )
        if name not in settable(config) and name not in vars(config):
            raise unknown_field(config, name, where)
        if isinstance(value, dict) and isinstance(getattr(config, name), PreTrainedConfig):
            override(getattr(config, name), value, f"{where}.{name}")
        elif name != "model_type":
            try:
                setattr(config, name, value)
            except (TypeError, ValueError, StrictDataclassError) as error:
                raise RecipeError(f"{where}.{name} = {value!r}: {' '.join(str(error).split())}") from error


def refuse_ignored(config: PreTrainedConfig, values: dict, where: str = "model.config") -> None:
    """Errs at a key that a new configuration only carries along.

    transformers keeps what no field takes as an attribute; an older name that a foreign configuration understands is used up.
    """
    for name, value in values.items():
        if name not in settable(config) and name in vars(config):
            raise unknown_field(config, name, where)
        if isinstance(value, dict) and isinstance(getattr(config, name, None), PreTrainedConfig):
            refuse_ignored(getattr(config, name), value, f"{where}.{name}")


def settable(config: PreTrainedConfig) -> set[str]:
    """Names that a configuration takes: fields, their other names, and properties that can be set."""
    kind = type(config)
    properties = {name for name in dir(kind) if getattr(getattr(kind, name), "fset", None)}
    return {field.name for field in fields(kind)} | set(kind.attribute_map) | properties | {"model_type"}


def unknown_field(config: PreTrainedConfig, name: str, where: str) -> RecipeError:
    shown = sorted(known for known in settable(config) if not known.startswith("_"))
    nearest = difflib.get_close_matches(name, shown, n=1, cutoff=0)[0]
    return RecipeError(f"{where}.{name}: {type(config).__name__} has no such field; the nearest is {nearest!r}")


def chosen_precision(name: str, device: torch.device) -> str:
    """`training.mixed_precision` with "auto" decided: "bf16" where the device has fast instructions for it, else "no"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "no" if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2") else "bf16"


def build_model(
    recipe: Recipe, config: PreTrainedConfig, tokenizer: Any, auto_class: Any = AutoModelForPreTraining
) -> PreTrainedModel:
    """Float32 weights, saved or random; a new model gets the vocabulary of the tokenizer.

    Args:
        auto_class: with `from_pretrained` and `from_config`, the Auto class of what the model is trained for. A head that a saved model
            lacks is new.

    Raises:
        RecipeError: a model without such a head, or a tower of `model.towers` that it does not have or that its weights do not fit.
    """
    attention = {"attn_implementation": recipe.training.attention} if recipe.training.attention else {}
    if type(config) not in auto_class._model_mapping:
        raise RecipeError(
            f"model: {config.model_type} has no class for {auto_class.__name__}; choose another architecture or task"
        )
    if recipe.model.from_pretrained:
        # half-precision weights would not survive the first step
        source, wanted = recipe.model.from_pretrained, image_size(config)
        before = AutoConfig.from_pretrained(source)
        if wanted != image_size(before):
            image_config(config).image_size = image_size(before)
        model, found = auto_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **attention,
        )
        refuse_other_sizes(found["mismatched_keys"], before.num_labels, config.num_labels)
        if wanted != image_size(before):
            resize_images(model, wanted)
        if hasattr(model, "queue"):
            model.queue.forget_images()
        return model
    text = text_config(config)
    text.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, getattr(tokenizer, name))
    model = auto_class.from_config(config, **attention)
    for name, source in recipe.model.towers.items():
        try:
            (model if hasattr(model, "fill_tower") else model.base_model).fill_tower(name, source)
        except (ValueError, OSError, AttributeError) as error:
            raise RecipeError(f"model.towers.{name} = {source!r}: {' '.join(str(error).split())}") from error
    return model


def refuse_other_sizes(
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], stored: int, wanted: int
) -> None:
    """Errs at weights that have not the model's sizes, but for a head that chose from `stored` classes and is to choose from `wanted`.

    Args:
        mismatched: name, stored shape and the model's, of each of these weights; they are new in the model.
    """
    for name, saved, own in mismatched:
        if (*saved[:1], *own[:1]) != (stored, wanted) or saved[1:] != own[1:]:
            raise RecipeError(
                f"model.config: {name} is {list(saved)} in the saved model and would be {list(own)}; leave out what changes its size"
            )


def resize_images(model: PreTrainedModel, size: int) -> None:
    """Go on with images of another size; only a model with a table of positions has to be changed for it."""
    if hasattr(model, "resize_image_positions"):
        model.resize_image_positions(size)
    else:
        image_config(model.config).image_size = size
