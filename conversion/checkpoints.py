"""Weight files in and out: foreign files read as plain state dicts, results written whole or not at all.

Nothing that a file holds is ever executed. Reads `torch.save` files (zip and the older single-pickle layout),
TorchScript archives, safetensors, and transformers or open_clip folders.
"""

import argparse
import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from conversion.torchscript import (
    LIGHTNING,
    HarmlessUnpickler,
    UnsafeGlobalError,
    is_torchscript,
    named_only,
    read_pickle_of,
    read_torchscript,
)
from hf_vlp.files import whole_file

# Where training scripts keep the state dict inside the saved dictionary, in the order of preference.
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
# Prefixes that wrappers of the model add to every name: DistributedDataParallel, torch.compile.
PREFIXES = ("module.", "_orig_mod.")
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
LEGACY_MAGIC = (
    0x1950A86A20F9469CFC6C  # first pickle of a torch.save file before the zip layout (torch/serialization.py)
)
MOST_NAMED = 100  # classes of Lightning that a file may name; each takes another reading
LONGEST_SAFETENSORS_HEADER = 100_000_000  # bytes; limit of the safetensors format
DOWNLOAD_AGAIN = "download the file again and compare its size or SHA-256 with the source"
# Names that only one family of checkpoints has: for saying what a file is that a converter refuses.
FAMILIES = (
    (r"(clip\.)?text_model\.final_norm\.", "hf_vlp's own CLIP, already converted: AutoModel loads it"),
    (r"text_decoder\.", "CoCa of open_clip"),
    (r"visual\.trunk\.", "open_clip with a timm image tower"),
    (r"visual\.(conv1|transformer|layer1|attnpool)\.", "CLIP in OpenAI's or open_clip's layout"),
    (r"(vision_model\.)?head\.probe", "transformers' SigLIP"),
    (r"(vision|text)_model\.encoder\.layers\.", "transformers' CLIP or a relative"),
    (r"visual_encoder(_m)?\.blocks\.", "ALBEF or BLIP"),
    (r"transformer\.blocks\.\d+\.(mlp_vl|mlp_imag|gamma_1)", "VLMo"),
    (r"transformer\.blocks\.\d+\.|token_type_embeddings\.", "ViLT"),
    (r"(bert\.)?encoder\.c_layer\.", "ViLBERT"),
    (r"(img_enc|txt_enc)\.", "VSE-infinity"),
    (r"(bert\.|roberta\.)?(encoder\.layer\.\d+\.attention\.self|embeddings\.word_embeddings)\.", "BERT or a relative"),
    (r"blocks\.\d+\.(attn|mlp)\.", "a timm vision transformer"),
    (r"(conv1|layer1\.0\.conv1)\.weight", "a torchvision or timm ResNet"),
)


class CheckpointError(ValueError):
    """A weight file that cannot be read: names the file, the reason and the remedy."""

    def __init__(self, path, reason: str, remedy: str):
        super().__init__(f"{path}: {reason}. Remedy: {remedy}.")


class UnsafeCheckpointError(CheckpointError):
    """A weight file that asks for more than tensors and plain containers. Nothing of it was run."""

    def __init__(self, path, name: str):
        super().__init__(
            path,
            f"the file asks to call {name}, which no state dict needs; nothing was run",
            "get the weights from a source you trust, as safetensors or as a plain state dict of tensors",
        )


def read_checkpoint(path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Read a weight file or folder into {name: tensor}, on the CPU, in the stored precision.

    Wrappers around the state dict (`{"state_dict": ...}`, `{"model": ...}`) and prefixes of all names (`module.`) are
    removed.

    Args:
        path: a file, or a folder that holds one of FOLDER_FILES.
        sha256: the expected hash of the file in hexadecimal, checked before reading.

    Raises:
        CheckpointError: missing, empty, truncated, not a weight file, another hash, or no tensors in it.
        UnsafeCheckpointError: the file asks for code.
    """
    path = Path(path)
    if not path.is_dir():
        return strip_prefixes(find_state_dict(read_content(path, sha256), path))
    if sha256:
        raise CheckpointError(path, "a SHA-256 was given but this is a folder", "name the weight file itself")
    return _read_folder(path)


@dataclass(frozen=True)
class Original:
    """A file of the original. state: its tensors. options: what the file tells besides, see the `infer_config` of its layouts."""

    state: dict[str, torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def read_content(path, sha256: str | None = None):
    """All that a weight file holds: tensors on the CPU, numbers, texts, plain containers and `argparse.Namespace`s.

    A class of Lightning that a file names without calling it, as the states of callbacks are kept under their classes, comes as an empty
    class that stands for it; nothing is imported.

    Args:
        path: a file. sha256: as for `read_checkpoint`.

    Raises:
        CheckpointError: missing, a folder, empty, truncated, not a weight file, or another hash.
        UnsafeCheckpointError: the file asks for code.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(path, "this is a folder", "name the weight file itself")
    if not path.exists():
        raise CheckpointError(path, "no such file or folder", "check the path")
    if sha256:
        check_sha256(path, sha256)
    return _read_file(path)


def check_sha256(path: Path, expected: str) -> None:
    """Raises CheckpointError if the file's SHA-256 is not `expected` (hexadecimal, any case)."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if found != expected.lower():
        raise CheckpointError(path, f"SHA-256 is {found}, expected {expected.lower()}", DOWNLOAD_AGAIN)


def _digest(file) -> str:
    # hashlib.file_digest is new in Python 3.11
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def find_state_dict(content, path="checkpoint") -> dict[str, torch.Tensor]:
    """The dictionary of tensors inside what a training script saved. Plain numbers become scalar tensors.

    Raises:
        CheckpointError: if there is none, or entries are neither tensors nor numbers.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            path, f"holds a {type(content).__name__}, not a state dict", "save model.state_dict() instead"
        )
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping) and any(
            isinstance(value, torch.Tensor) for value in content[key].values()
        ):
            return find_state_dict(content[key], path)
    others = [
        f"{key}: {type(value).__name__}"
        for key, value in content.items()
        if not isinstance(value, torch.Tensor | int | float)
    ]
    if others or not any(isinstance(value, torch.Tensor) for value in content.values()):
        found = ", ".join(others[:5]) or "no tensors"
        raise CheckpointError(
            path,
            f"holds no plain state dict (found {found})",
            f"save the state dict alone, or under one of the keys {', '.join(WRAPPERS)}",
        )
    return {
        str(name): value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value)
        for name, value in content.items()
    }


def strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the PREFIXES that stand before every name (DistributedDataParallel, torch.compile), however often."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return strip_prefixes({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def looks_like(state: Mapping) -> str:
    """What family of models a state dict's names are of, for error messages."""
    for pattern, family in FAMILIES:
        if seen := next((name for name in state if re.match(pattern, name)), None):
            return f"{family} ({seen})"
    return "no layout known here"


def _read_file(path: Path):
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(path, "the file is empty", DOWNLOAD_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            path, "this is a git-lfs pointer, not the weights", "run `git lfs pull`, or download the file itself"
        )
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(
            path, "this is a web page, not a weight file", "the link gave an error or login page: download again"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_SAFETENSORS_HEADER:
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        return _read_zip(path)
    if head.startswith(b"\x80"):
        return _read_legacy(path)
    raise CheckpointError(
        path, f"unknown file type (starts with {head[:8]!r})", "give a torch, TorchScript or safetensors file"
    )


def _read_safetensors(path: Path):
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(path, f"damaged or truncated safetensors file ({error})", DOWNLOAD_AGAIN) from error


def _read_zip(path: Path):
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            path, f"the archive is cut short ({path.stat().st_size} bytes, no end record)", DOWNLOAD_AGAIN
        )
    try:
        with zipfile.ZipFile(path) as archive:
            if is_torchscript(archive):
                return read_torchscript(archive)
            try:
                return _torch_load(path, mmap=True)
            except pickle.UnpicklingError as error:
                if "Unsupported operand" not in str(error):
                    raise
                return read_pickle_of(
                    archive
                )  # torch.save(pickle_protocol=4): torch's own safe loader reads protocol 2 only
    except UnsafeGlobalError as error:
        raise UnsafeCheckpointError(path, error.name) from error
    except pickle.UnpicklingError as error:
        # The end record is there, so the file is whole: what the loader refuses is what somebody put in.
        raise _refused(path, error) from error
    except Exception as error:
        raise CheckpointError(path, f"damaged archive ({type(error).__name__}: {error})", DOWNLOAD_AGAIN) from error


def _read_legacy(path: Path):
    try:
        with open(path, "rb") as file:
            magic = HarmlessUnpickler(file).load()
        if magic != LEGACY_MAGIC:
            raise CheckpointError(
                path, "a pickle that torch.save did not write", "give a file written by torch.save or safetensors"
            )
        return _torch_load(path)
    except CheckpointError:
        raise
    except UnsafeGlobalError as error:
        raise UnsafeCheckpointError(path, error.name) from error
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:
        raise CheckpointError(
            path, f"damaged or truncated file ({type(error).__name__}: {error})", DOWNLOAD_AGAIN
        ) from error


class _NumpyType:
    """The type of a number of numpy as a pickle tells it: "f8", and its byte order."""

    def __init__(self, name: str, *_):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]


def _numpy_number(kind: _NumpyType, data: bytes) -> int | float | bool:
    """The plain number behind the bytes of one of numpy.

    Raises:
        UnpicklingError: anything else than a number.
    """
    told = f"{kind.order}{kind.name}" if isinstance(kind, _NumpyType) else ""
    if not re.fullmatch(r"[<>=|]([iu][1248]|f[248]|b1)", told):
        raise pickle.UnpicklingError("a value of numpy that is no number")
    return np.frombuffer(data, dtype=told, count=1)[0].item()


def _torch_load(path: Path, **options):
    # Training scripts keep their command line beside the weights; a Namespace only holds attributes. Their scores may be numbers of
    # numpy, for which functions of ours stand in. Lightning keeps the states of callbacks under their classes: empty classes stand in,
    # which refuse to be called, so that a file that calls one is refused as any other.
    numbers = [(_numpy_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    known = [argparse.Namespace, (_NumpyType, "numpy.dtype"), *numbers]
    named: dict[str, type] = {}
    while True:
        stand_ins = [(stand_in, name) for name, stand_in in named.items()]
        try:
            with torch.serialization.safe_globals([*known, *stand_ins]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, **options)
        except pickle.UnpicklingError as error:
            name = _asked_for(error) or ""
            if not name.startswith(LIGHTNING) or name in named or len(named) == MOST_NAMED:
                raise
            named[name] = named_only(name)


def _asked_for(error: Exception) -> str | None:
    """The class or function that a refusal names."""
    asked = re.search(r"(?:GLOBAL|class|global) ([A-Za-z_][\w.]*\w) (?:was|whose)", str(error))
    return asked and asked[1]


def _refused(path: Path, error: Exception) -> CheckpointError:
    if asked := _asked_for(error):
        return UnsafeCheckpointError(path, asked)
    reason = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0].strip().rstrip(".")
    return CheckpointError(path, f"not a readable state dict ({reason})", DOWNLOAD_AGAIN)


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    present = next((name for name in FOLDER_FILES if (folder / name).exists()), None)
    if present is None:
        listing = ", ".join(sorted(item.name for item in folder.iterdir())[:10]) or "nothing"
        raise CheckpointError(
            folder, f"the folder holds no weights (found {listing})", f"it needs one of {', '.join(FOLDER_FILES)}"
        )
    if not present.endswith(".index.json"):
        return read_checkpoint(folder / present)
    try:
        shards = sorted(set(json.loads((folder / present).read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(folder / present, "not an index of weight shards", DOWNLOAD_AGAIN) from error
    state = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(
                folder / present, f"names a shard outside its folder ({shard})", "get the folder from its source"
            )
        state.update(read_checkpoint(folder / shard))
    return state


def save_state_dict(state: dict[str, torch.Tensor], output, overwrite: bool = False) -> None:
    """Write a plain state dict with `torch.save`, or as safetensors if the name ends so; whole or not at all.

    Raises:
        FileExistsError: `output` exists and `overwrite` is false.
    """
    output = Path(output)
    _refuse_existing(output, overwrite)
    with whole_file(output) as partial:
        if output.suffix == ".safetensors":
            safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
        else:
            torch.save(dict(state), partial)


def save_content(content: dict, output, overwrite: bool = False) -> None:
    """Write what a training script would have saved, whole or not at all, in the layout that every version of torch reads.

    Raises:
        FileExistsError: `output` exists and `overwrite` is false.
    """
    output = Path(output)
    _refuse_existing(output, overwrite)
    with whole_file(output) as partial:
        torch.save(content, partial, _use_new_zipfile_serialization=False)


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if output.exists() and (not overwrite or output.is_dir()):
        raise FileExistsError(f"{output} exists; give another --output, or --overwrite a file")
