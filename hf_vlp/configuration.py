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
