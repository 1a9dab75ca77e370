"""What every configuration of this package does beyond transformers' own checks."""

import difflib
from dataclasses import fields

from transformers.configuration_utils import PreTrainedConfig


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


class OwnArchitectureOnly:
    """Mixed into a configuration in front of `PreTrainedConfig`: refuses the file of another architecture.

    transformers only warns, and builds a model of defaults whose every weight is then random.
    """

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
