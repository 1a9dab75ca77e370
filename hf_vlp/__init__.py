"""Six architectures of vision-language pre-training as Hugging Face models; importing it registers them."""

import importlib

from hf_vlp import auto as _auto

__version__ = "0.1.0"

_CLASSES = {name.partition(":")[2]: name for row in _auto.TABLE.values() for name in row.names()}
__all__ = ["__version__", *sorted(_CLASSES), *_auto.OWN_AUTO_CLASSES]


def __getattr__(name: str):
    if name in _CLASSES:
        return _auto.resolve(_CLASSES[name])
    if name in _auto.OWN_AUTO_CLASSES:
        return getattr(_auto, name)
    try:
        return importlib.import_module(f"hf_vlp.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"hf_vlp.{name}":
            raise
        raise AttributeError(f"module 'hf_vlp' has no attribute {name!r}") from None


def __dir__():
    return sorted({*globals(), *__all__})


_auto.register()
