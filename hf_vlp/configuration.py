"""What every configuration of this package does beyond transformers' own checks."""

import difflib
from dataclasses import fields

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


def refuse_near_misses(config: PreTrainedConfig, unknown: dict) -> None:
    """Raise where an unknown keyword looks like a field of `config` misspelt, and that field was left at its default.

    transformers keeps unknown keywords as attributes (saved files carry bookkeeping that way), so a misspelt field would
    silently leave its default in place.

    Raises:
        TypeError: naming the keyword and the field it resembles.
    """
    defaults = {field.name: field.default for field in fields(config)}
    for key in unknown:
        near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.85)
        if not near or key.startswith("_") or hasattr(type(config), key) or key in config.attribute_map:
            continue
        if getattr(config, near[0]) == defaults[near[0]]:
            raise TypeError(f"{type(config).__name__} has no field {key!r}: did you mean {near[0]!r}?")


class CheckedConfig:
    """Mixed into a configuration in front of `PreTrainedConfig`: refuses misspelt fields and the file of another architecture.

    Of the latter transformers only warns, and builds a model of defaults whose every weight is then random. Parts may be given by name,
    see `tower_by_name`, where their fields allow text.
    """

    def __post_init__(self, **kwargs):
        refuse_near_misses(self, kwargs)
        for key in self.sub_configs_defaults:
            if isinstance(getattr(self, key), str):
                setattr(self, key, tower_by_name(getattr(self, key)))
        self.complete()
        super().__post_init__(**kwargs)

    def complete(self) -> None:
        """What a class derives of its fields, before the configurations of its parts are made and anything is checked."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers.

        Raises:
            ValueError: naming the file's `model_type` where it is not that of this class.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"the configuration is of model_type {found!r}, {cls.__name__} describes {cls.model_type!r}: load it with AutoModel, "
                "or convert the checkpoint first"
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict, dict]:
        """As in transformers.

        Raises:
            ValueError: a tower's configuration asked for in the folder of a model that has no such tower.
        """
        found, kwargs = super().get_config_dict(*args, **kwargs)
        if cls.base_config_key and found.get(cls.base_config_key, found) is None:
            raise ValueError(
                f"the {found['model_type']!r} of this folder has no {cls.base_config_key}, which {cls.__name__} describes"
            )
        return found, kwargs


def require_positive(config: PreTrainedConfig, *names: str) -> None:
    """Raise a ValueError unless the fields `names`, numbers or lists of them, are all 1 or more."""
    for name in names:
        value = getattr(config, name)
        if any(item < 1 for item in (value if isinstance(value, (list, tuple)) else [value])):
            raise ValueError(f"{type(config).__name__}.{name} must be 1 or more, got {value}")


def require_choice(config: PreTrainedConfig, **choices: tuple) -> None:
    """Raise a ValueError unless each field's value is one of its choices."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(config, name)!r}")


def require_heads_of_equal_width(config: PreTrainedConfig) -> None:
    """Raise a ValueError unless `num_attention_heads` divides `hidden_size`."""
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}; the paper uses "
            "heads of 64"
        )


def tower_by_name(name: str) -> PreTrainedConfig | dict:
    """The configuration behind a tower's name: "timm/<architecture>", or a transformers model's folder or Hub id."""
    if name.startswith("timm/"):
        return {"model_type": "timm_wrapper", "architecture": name.removeprefix("timm/")}
    return AutoConfig.from_pretrained(name)
