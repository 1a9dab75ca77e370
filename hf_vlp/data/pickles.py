"""Pickles of arrays and plain containers, read without executing anything they ask for.

A pickle is a program. The one here may build numbers, texts, lists, tuples, dicts, sets and numpy arrays of numbers or texts, under
the module names of numpy 1 and 2; whatever else it names is an error. Even numpy's own classes are never handed to it: inert notes
of type, shape and bytes stand in for them, and become arrays after the program has ended.
"""

import collections
import io
import math
import pickle
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

DEEPEST = 64  # containers within containers
MOST_ITEMS = 2**24  # of a pickle's containers, with one that is in several places counted at each
NUMBERS_AND_TEXTS = "biufSU"  # kinds of numpy's types; "O" is a list of whatever, "V" and the rest have no place here


class UnsafeGlobalError(pickle.UnpicklingError):
    """A pickle asks for a class or function outside the list of harmless ones. `name` is what it asked for."""

    def __init__(self, name: str):
        super().__init__(f"the pickle asks for {name}, which is none of numbers, arrays, tensors and plain containers")
        self.name = name

    def __reduce__(self):
        return type(self), (self.name,)


class _Harmless:
    """Stands in for a class or function that a pickle names: it can be called and nothing else."""

    def __init__(self, make: Callable[..., Any]):
        self._make = make

    def __call__(self, *arguments):
        return self._make(*arguments)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("the pickle gives a state to a class or function")


class _Type:
    """The note of a numpy dtype."""

    def __init__(self, code="f4", *_):
        self.code, self.order = _text(code), ""

    def __setstate__(self, state):
        self.order = _text(state[1])

    def dtype(self) -> np.dtype:
        if not isinstance(self.code, str):
            raise pickle.UnpicklingError(f"an array of a {type(self.code).__name__} is no array of numbers or texts")
        dtype = np.dtype(self.code) if len(self.code) < 16 else np.dtype("V")
        if dtype.kind not in NUMBERS_AND_TEXTS + "O":
            raise pickle.UnpicklingError(f"an array of {self.code!r:.80} is no array of numbers or texts")
        return dtype.newbyteorder(self.order) if self.order in ("<", ">") else dtype


class _Array:
    """The note of a numpy array, or of one number of its kind."""

    def __init__(self, dtype=None, data=b"", shape=(), fortran=False):
        self.dtype, self.data, self.shape, self.fortran = dtype, data, shape, fortran

    def __setstate__(self, state):
        self.shape, self.dtype, self.fortran, self.data = state[-4:]

    def value(self, depth: int, done: dict[int, Any]) -> Any:
        if not isinstance(self.dtype, _Type):
            raise pickle.UnpicklingError("an array without a type")
        dtype, shape = self.dtype.dtype(), self.shape
        if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
            raise pickle.UnpicklingError("an array whose shape is no tuple of whole numbers")
        if dtype.kind == "O":
            if not isinstance(self.data, list) or len(self.data) != math.prod(shape):
                raise pickle.UnpicklingError(f"an array of objects without its {math.prod(shape)} objects")
            values = [_plain(item, depth + 1, done) for item in self.data]
            return values if shape else values[0]
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data  # written by Python 2
        if not isinstance(data, bytes | bytearray) or len(data) != math.prod(shape) * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"an array of {shape} {dtype} without its {math.prod(shape) * dtype.itemsize} bytes"
            )
        if not data:
            if math.prod(shape):
                raise pickle.UnpicklingError(f"an array of {shape} numbers of no bytes")
            return np.zeros(shape, dtype)
        return np.frombuffer(data, dtype).reshape(shape, order="F" if self.fortran else "C")


def _encode(text: str, encoding: str = "") -> bytes:
    """Bytes in a pickle of Python 3 for Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise pickle.UnpicklingError("bytes as text in another encoding than latin1")
    return text.encode("latin1")


def _bytes(value: Any = "", *_) -> bytes:
    return _text(value).encode("latin1")


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _scalar(dtype, data=b"") -> _Array:
    return _Array(dtype, data)


def _from_buffer(data, dtype, shape, order) -> _Array:
    return _Array(dtype, data, shape, _text(order) == "F")


def _keyed(value: Any) -> Any:
    """A key or an item of a set, which must be a number, a text, bytes or None: what contains others takes for ever to hash, or crashes."""
    if value is not None and not isinstance(value, int | float | complex | str | bytes | _Array):
        raise pickle.UnpicklingError(f"a {type(value).__name__} as a key, where numbers and texts are expected")
    return value


def _ordered(pairs=()) -> collections.OrderedDict:
    return collections.OrderedDict((_keyed(key), value) for key, value in pairs)


def _set(items=()) -> set:
    return {_keyed(item) for item in items}


HARMLESS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): lambda *_: _Array(),
    ("numpy", "dtype"): _Type,
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): lambda *items: frozenset(_set(*items)) for module in ("builtins", "__builtin__")},
    **{(module, "bytes"): _bytes for module in ("builtins", "__builtin__")},
    **{(module, "bytearray"): _bytes for module in ("builtins", "__builtin__")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class ArrayUnpickler(pickle._Unpickler):
    """Builds plain containers and notes of arrays; any other name raises UnsafeGlobalError. `read_pickle` is its one user.

    It is Python's own in Python: that in C makes room for whatever number of objects a pickle says it will refer to, and its steps
    cannot be told to look at keys. A record has few of them.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        if (module, name) not in HARMLESS:
            raise UnsafeGlobalError(f"{module}.{name}")
        return _Harmless(HARMLESS[module, name])  # a new one each time: a pickle may alter what it has been given

    def _keys_first(step: bytes, first: int, each: int):
        """The step of an opcode, after a look at the keys among what it takes from the stack."""
        usual = pickle._Unpickler.dispatch[step[0]]

        def look_and_do(self):
            for value in self.stack[first::each]:
                _keyed(value)
            usual(self)

        return look_and_do

    dispatch[pickle.SETITEM[0]] = _keys_first(pickle.SETITEM, -2, 2)
    for step, each in ((pickle.SETITEMS, 2), (pickle.DICT, 2), (pickle.ADDITEMS, 1), (pickle.FROZENSET, 1)):
        dispatch[step[0]] = _keys_first(step, 0, each)

    def _build(self):
        if not isinstance(self.stack[-2], _Array | _Type):
            raise pickle.UnpicklingError(f"the pickle gives a state to a {type(self.stack[-2]).__name__}")
        pickle._Unpickler.load_build(self)

    def _bytearray(self):
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(size)))  # as long as what is there, whatever it says

    def _extension(self):
        raise pickle.UnpicklingError("the pickle asks for an extension by its number")

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray
    dispatch[pickle.EXT1[0]] = dispatch[pickle.EXT2[0]] = dispatch[pickle.EXT4[0]] = _extension


def read_pickle(data: bytes) -> Any:
    """What a pickle of arrays and plain containers describes. An array of objects comes as a list, one without dimensions as its object.

    Raises:
        UnsafeGlobalError: it names anything else.
        pickle.UnpicklingError: it is damaged, nested more than 64 deep, or holds more than 2**24 items.
    """
    try:
        # latin1 is how numpy's arrays in a pickle of Python 2 come back to their bytes
        return _plain(ArrayUnpickler(io.BytesIO(data), encoding="latin1").load(), 0, {})
    except pickle.UnpicklingError as error:
        if str(error).startswith("pickle exhausted"):  # the one of Python's own that a file cut short gives
            raise pickle.UnpicklingError(f"damaged pickle ({error})") from None
        raise
    except (
        Exception
    ) as error:  # the machine of pickle raises whatever its operands do: EOFError, IndexError, TypeError, ...
        raise pickle.UnpicklingError(f"damaged pickle ({type(error).__name__}: {error})") from None


def read_npy(path: str | Path) -> Any:
    """The array of a .npy file, memory-mapped, or the content of a pickled one.

    Raises:
        UnsafeGlobalError, pickle.UnpicklingError: as `read_pickle`.
        ValueError: it is no .npy file, or a truncated one.
    """
    with open(path, "rb") as file:
        shape, fortran, dtype = _npy_header(file, path)
        if not dtype.hasobject:
            try:
                return np.load(path, mmap_mode="r" if math.prod(shape) and shape else None, allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(f"{path} is truncated or damaged ({error})") from None
        return read_pickle(file.read())


def read_npy_bytes(data: bytes, name: str) -> Any:
    """As `read_npy`, of the bytes of a file."""
    file = io.BytesIO(data)
    _, _, dtype = _npy_header(file, name)
    if dtype.hasobject:
        return read_pickle(file.read())
    file.seek(0)
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name} is truncated or damaged ({error})") from None


def _npy_header(file, name) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)
    except (ValueError, EOFError, SyntaxError) as error:
        raise ValueError(f"{name} is no .npy file ({error})") from None


def _plain(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """The value with arrays in place of their notes. `done`: id -> (value, result, items), so that what is shared is made once."""
    if depth > DEEPEST:
        raise pickle.UnpicklingError(f"containers are nested more than {DEEPEST} deep")
    if isinstance(value, _Harmless | _Type):
        raise pickle.UnpicklingError("the pickle holds a class or function")
    if not isinstance(value, dict | list | tuple | set | frozenset | _Array):
        return value
    if id(value) not in done:
        result = _remade(value, depth, done)
        items = 1 + sum(done[id(part)][2] if id(part) in done else 1 for part in _parts(value))
        if items > MOST_ITEMS:  # whoever prints it or makes an array of it would meet each of them
            raise pickle.UnpicklingError(f"containers that hold each other so often that they have {items:,} items")
        done[id(value)] = value, result, items
    return done[id(value)][1]


def _parts(value: Any) -> Iterable:
    if isinstance(value, _Array):
        return value.data if isinstance(value.data, list) else ()
    return chain(value.keys(), value.values()) if isinstance(value, dict) else value


def _remade(value: Any, depth: int, done: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        return {_keyed(_plain(key, depth + 1, done)): _plain(item, depth + 1, done) for key, item in value.items()}
    if isinstance(value, _Array):
        array = value.value(depth, done)
        return array.item() if isinstance(array, np.ndarray) and not array.ndim else array
    look = _keyed if isinstance(value, set | frozenset) else lambda item: item
    return type(value)(look(_plain(item, depth + 1, done)) for item in value)
