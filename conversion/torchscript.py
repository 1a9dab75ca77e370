"""The state dict of a TorchScript archive, read without running any of it.

An archive (`torch.jit.save`) is a zip of `<name>/data.pkl` (the module tree as a pickle), `<name>/data/<key>` (raw
storages), `<name>/code/**/*.py` (class declarations and methods), constants and version. `torch.jit.load` compiles the code;
here the pickle goes through an unpickler that knows a short list of harmless names, every `__torch__.*` class becomes an
inert bag of attributes, and of the code only the lines that list parameter and buffer names are read, as text.
"""

import argparse
import collections
import pickle
import re
import sys
import zipfile
from pathlib import PurePosixPath

import torch

from hf_vlp.data.pickles import UnsafeGlobalError


class ScriptObject:
    """What stands in for an instance of any `__torch__.*` class: its attributes and nothing else."""

    qualified_name = ""

    def __init__(self, *_):
        self.attributes = {}

    def __new__(cls, *_):
        instance = super().__new__(cls)
        instance.attributes = {}
        return instance

    def __setstate__(self, state):
        self.attributes = dict(state) if isinstance(state, dict) else {"state": state}


LIGHTNING = "pytorch_lightning."  # its checkpoints have the classes of their callbacks as keys


class NamedOnly:
    """What stands in for a class that a pickle may name but not make an object of."""

    def __new__(cls, *_):
        # in the words of torch's own refusals, which say what was asked for
        raise pickle.UnpicklingError(f"class {cls.__qualname__} whose objects no state dict needs")


def named_only(qualified: str) -> type:
    """A new `NamedOnly` of that name: one for each file, as a pickle may alter what it has been given."""
    return type("NamedOnly", (NamedOnly,), {"__qualname__": qualified})


# Storage classes are only asked for their element type, so the type stands in for the class.
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _view_of_storage(storage, offset, size, stride, *_):
    # as_strided refuses to reach outside the storage; Tensor.set_ would silently enlarge it.
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def _first_argument(value=None, *_):
    return value


HARMLESS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _view_of_storage,
    ("torch._utils", "_rebuild_parameter"): _first_argument,
    ("torch.jit._pickle", "restore_type_tag"): _first_argument,
    ("torch", "device"): _first_argument,
    **{
        ("torch.jit._pickle", f"build_{kind}"): _first_argument
        for kind in ("intlist", "tensorlist", "doublelist", "boollist", "tensor_from_id")
    },
    **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
}


class HarmlessUnpickler(pickle.Unpickler):
    """Builds numbers, strings, containers, tensors and inert bags; any other name raises UnsafeGlobalError.

    A class of Lightning comes as a `NamedOnly`.

    Args:
        file: the pickle.
        read_storage: key -> bytes of that storage; None where the pickle has no business with storages.
        byteorder: of the storages, "little" or "big".
    """

    def __init__(self, file, read_storage=None, byteorder: str = "little"):
        super().__init__(file)
        self.read_storage = read_storage
        self.byteorder = byteorder
        self.script_classes = {}
        self.storages = {}
        # training scripts keep their command line beside the weights; a class of its own, as a pickle may alter what it is given
        self.namespace = type("Namespace", (argparse.Namespace,), {})

    def find_class(self, module, name):
        if (module, name) in HARMLESS:
            return HARMLESS[module, name]
        if (module, name) == ("argparse", "Namespace"):
            return self.namespace
        if module == "__torch__" or module.startswith("__torch__."):
            qualified = f"{module}.{name}"
            if qualified not in self.script_classes:
                self.script_classes[qualified] = type("ScriptObject", (ScriptObject,), {"qualified_name": qualified})
            return self.script_classes[qualified]
        if module.startswith(LIGHTNING):
            return named_only(f"{module}.{name}")
        raise UnsafeGlobalError(f"{module}.{name}")

    def persistent_load(self, pid):
        """("storage", type, key, location, number of elements) -> 1-D tensor on the CPU, wherever it was saved."""
        kind, dtype, key, _location, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or self.read_storage is None:
            raise pickle.UnpicklingError(f"unknown kind of stored object: {pid!r}")
        if key not in self.storages:
            data = bytearray(self.read_storage(str(key)))
            if len(data) != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes instead of {count * dtype.itemsize}")
            storage = torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)
            if count and self.byteorder != sys.byteorder:
                storage.untyped_storage().byteswap(dtype)
            self.storages[key] = storage
        return self.storages[key]


def archive_root(names: list[str]) -> str | None:
    """The folder inside a zip made by torch ("<name>/"), where data.pkl is; None if the zip was not made by torch."""
    roots = [
        name[: -len("data.pkl")] for name in names if PurePosixPath(name).name == "data.pkl" and name.count("/") == 1
    ]
    return roots[0] if len(roots) == 1 else None


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether the zip is a TorchScript archive rather than a file of `torch.save`."""
    names = archive.namelist()
    root = archive_root(names)
    return root is not None and f"{root}constants.pkl" in names


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    """What `torch.jit.load(...).state_dict()` would give, on the CPU, without compiling or running the archive's code.

    Raises:
        UnsafeGlobalError: the pickle names something outside the list of harmless names.
        pickle.UnpicklingError, KeyError, RuntimeError, ...: the archive is damaged.
    """
    names = archive.namelist()
    root = archive_root(names)
    module = read_pickle_of(archive)
    if not isinstance(module, ScriptObject):
        raise pickle.UnpicklingError(f"the archive holds a {type(module).__name__}, not a module")
    declared = {}
    for name in names:
        if name.startswith(f"{root}code/") and name.endswith(".py"):
            path = name[len(f"{root}code/") : -len(".py")].replace("/", ".")
            declared.update(_declared_tensors(archive.read(name).decode("utf-8"), path))
    return dict(_named_tensors(module, declared, "", ()))


def read_pickle_of(archive: zipfile.ZipFile):
    """The object that data.pkl of a zip made by torch describes, with its tensors on the CPU.

    Raises:
        UnsafeGlobalError: the pickle names something outside the list of harmless names.
    """
    names = archive.namelist()
    root = archive_root(names)
    if root is None:
        raise pickle.UnpicklingError("the zip was not made by torch: it has no data.pkl")
    byteorder = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
    with archive.open(f"{root}data.pkl") as file:
        return HarmlessUnpickler(file, lambda key: archive.read(f"{root}data/{key}"), byteorder).load()


def _declared_tensors(source: str, module: str) -> dict[str, set[str]]:
    """Qualified class name -> names of its parameters and buffers, from the declarations in the archive's code."""
    declared = {}
    for block in re.split(r"^class ", source, flags=re.MULTILINE)[1:]:
        lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", block, flags=re.MULTILINE)
        if len(lists) == 2:  # early versions list parameters only; then every tensor attribute counts
            declared[f"{module}.{re.match(r'[^(:]+', block)[0]}"] = set(re.findall(r'"([^"]+)"', ",".join(lists)))
    return declared


def _named_tensors(module: ScriptObject, declared: dict, prefix: str, parents: tuple):
    if id(module) in parents:
        raise pickle.UnpicklingError(f"the module tree contains itself at {prefix or 'its root'}")
    tensors = declared.get(module.qualified_name)  # plain tensor attributes are no part of a state dict
    for name, value in module.attributes.items():
        if isinstance(value, torch.Tensor) and (tensors is None or name in tensors):
            yield prefix + name, value
    for name, value in module.attributes.items():
        if isinstance(value, ScriptObject):
            yield from _named_tensors(value, declared, f"{prefix}{name}.", (*parents, id(module)))
