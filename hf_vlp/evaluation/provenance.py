"""How a number was measured, in words for `results.json` and the card: conditions, command, data; no path of the machine."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from hf_vlp.evaluation.encoding import takes_regions

REPOSITORY = Path(__file__).resolve().parents[2]


def conditions(model: torch.nn.Module, processor: Any, autocast: torch.dtype | None = None) -> str:
    """What changes the numbers besides weights and data, e.g. "bfloat16 autocast, torchvision pictures".

    Args:
        model: its parameters tell the precision where there is no autocast.
        processor: its image processor tells the backend, its feature extractor the store of regions.
        autocast: type of the computation, as for `evaluate_retrieval`.
    """
    kinds = sorted({_name(value.dtype) for value in model.parameters() if value.is_floating_point()})
    precision = "/".join(kinds) if autocast is None else f"{_name(autocast)} autocast"
    if takes_regions(processor):
        store = getattr(processor.feature_extractor, "region_store", None)
        return f"{precision}, regions" + (f" of {shortened(store)}" if store else "")
    image_processor = getattr(processor, "image_processor", processor)
    return f"{precision}, {getattr(image_processor, 'backend', type(image_processor).__name__)} pictures"


def command(processes: int = 1) -> str:
    """The command of this program as one types it in the repository, on so many processes.

    A path outside the repository and the working folder is shortened to its name (`.../pairs.jsonl`).
    """
    script = Path(sys.argv[0]).resolve()
    launcher = ["python"]
    if processes > 1:
        launcher = ["accelerate", "launch", "--num_processes", str(processes)]
    elif "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by every launcher of accelerate
        launcher = ["accelerate", "launch"]
    return shlex.join([*launcher, f"{script.parent.name}/{script.name}", *map(_shortened_word, sys.argv[1:])])


def shortened(source: str | os.PathLike) -> str:
    """A path as seen from the repository if it lies there, else from the working folder, else `.../` and its name.

    What is no path with folders (a file beside, an id of the Hub) stays as it is, as does a relative path that leads
    elsewhere.
    """
    path = Path(source)
    if len(path.parts) < 2 or not (path.is_absolute() or os.path.exists(path)):  # False for what can be no path, too
        return str(source)
    for found in (path.resolve(), Path(os.path.abspath(path))):  # a link into the repository, or one out of it
        for folder in (REPOSITORY, Path.cwd()):
            if found.is_relative_to(folder):
                return found.relative_to(folder).as_posix()
    return f".../{path.name}" if path.is_absolute() else str(source)


def _shortened_word(word: str) -> str:
    option, equals, value = word.partition("=")
    return f"{option}={shortened(value)}" if equals else shortened(word)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
