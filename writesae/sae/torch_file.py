"""A `.pt` file as plain data, without unpickling: an archive of raw tensors, and a pickle that says what they are.

`torch.load(weights_only=True)` runs no code, but it believes the file: a storage that claims more than its record is
read past its end, and a compressed record unfolds without bound. Here the archive's records must be stored as they
are and lie inside the file, and the pickle is followed by a reader of its own, which knows the few instructions and
names that a dict of tensors and numbers needs and refuses every other. A tensor is a `Stored` until it is read.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..untrusted import first_line, is_integer, regular_size

_PICKLE_LIMIT = 2**20  # bytes: the tensors are elsewhere, so this holds names, shapes and a configuration
_READ_LIMIT = 4 * 2**20  # bytes of the archive's directory, which takes some ten times that in memory
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `size` and `stride` in elements, from `offset` on in the record `key`."""

    dtype: torch.dtype
    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def ndim(self) -> int:
        return len(self.size)

    def numel(self) -> int:
        return math.prod(self.size)


class TorchFile:
    """An open `.pt` file.

    Attributes:
        content: what was saved, tensors as `Stored`.

    Raises:
        ValueError: naming the file, for one that is torn, needs unpickling, or claims what it does not hold.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size = regular_size(self.path)
        try:
            self._file = _File(self.path)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror}") from error
        try:
            self._zip = zipfile.ZipFile(self._file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            self._file.close()
            raise self._refused(f"not an archive as torch.save writes since 1.6 ({first_line(error)})") from error
        try:
            self._records = self._inspect(size)
            self.content = _Reader(self._bytes("data.pkl"), self._records).run()
        except _Refused as error:
            self.close()
            raise self._refused(str(error)) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._zip.close()
        self._file.close()

    def read(self, stored: Stored) -> Tensor:
        """A tensor of its own memory."""
        data = self._bytes(f"data/{stored.key}")
        flat = torch.frombuffer(data, dtype=stored.dtype) if data else torch.empty(0, dtype=stored.dtype)
        return flat.as_strided(stored.size, stored.stride, stored.offset)

    def _refused(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.path}: refused: it is not a checkpoint of plain tensors and numbers. Loading it would mean "
            f"unpickling, which can run any code the file carries ({reason})"
        )

    def _inspect(self, size: int) -> dict[str, zipfile.ZipInfo]:
        """{record without the top folder: its entry}."""
        records: dict[str, zipfile.ZipInfo] = {}
        for entry in self._zip.infolist():
            name = entry.filename.partition("/")[2]
            if name in records:
                raise _Refused(f"two records {name!r}"[:200])
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size <= entry.compress_size
            if not stored or entry.flag_bits & 1:
                raise _Refused(f"a compressed record {name!r}"[:200])
            records[name] = entry
        if sum(entry.file_size for entry in records.values()) > size:
            raise _Refused("records larger than the file")
        if "data.pkl" not in records:
            raise _Refused("no data.pkl in the archive")
        if records["data.pkl"].file_size > _PICKLE_LIMIT:
            raise _Refused(f"data.pkl of {records['data.pkl'].file_size:,} bytes, at most {_PICKLE_LIMIT:,}")
        self._records = records
        if "byteorder" in records and records["byteorder"].file_size < 16:
            if (order := bytes(self._bytes("byteorder"))) != b"little":
                raise _Refused(f"byte order {order!r}, expected little")
        return records

    def _bytes(self, name: str) -> bytearray:
        entry = self._records[name]
        data = bytearray(entry.file_size)
        try:
            with self._zip.open(entry) as file:
                view, at = memoryview(data), 0
                while at < len(data) and (n := file.readinto(view[at : at + 2**20])):
                    at += n
                if at < len(data) or file.read(1):
                    raise zipfile.BadZipFile("torn")
        except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{self.path}: {name}: damaged ({first_line(error)})") from error
        return data


class _Refused(Exception):
    """Why a file is not plain data."""


class _File(io.FileIO):
    """A file that is read in small pieces only; what an archive asks for at once is its directory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _READ_LIMIT:
            raise zipfile.BadZipFile(f"a directory of {size:,} bytes, at most {_READ_LIMIT:,}")
        return super().read(size)


class _Call:
    """A name that the pickle may call."""

    def __init__(self, build):
        self.build = build


class _Reader:
    """Follows a pickle's instructions; calls only its own functions."""

    def __init__(self, data: bytearray, records: dict[str, zipfile.ZipInfo]):
        self._data, self._records = bytes(data), records
        self._stack: list[Any] = []
        self._marks: list[int] = []  # where tuples, lists and dicts begin on the stack
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(self._data):
                if opcode.name == "STOP":
                    return self._stack.pop()
                step = getattr(self, "_" + opcode.name.lower(), None)
                if step is not None:
                    step(argument)
                elif opcode.name in _CONSTANTS:
                    self._stack.append(_CONSTANTS[opcode.name]())
                elif opcode.name in _LITERALS:
                    self._stack.append(argument)
                elif opcode.name not in ("PROTO", "FRAME"):
                    raise _Refused(f"the instruction {opcode.name}")
        except _Refused:
            raise
        except Exception as error:  # a stack that is too short, a tuple as a list, a torn text: damaged, in many ways
            raise _Refused(f"a damaged pickle: {first_line(error)}") from error
        raise _Refused("a pickle without an end")

    # One method an instruction, `argument` as pickletools gives it.

    def _mark(self, _) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        at = self._marks.pop()
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def _binput(self, index) -> None:
        self._memo[index] = self._stack[-1]

    _long_binput = _binput

    def _memoize(self, _) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _binget(self, index) -> None:
        self._stack.append(self._memo[index])

    _long_binget = _binget

    def _tuple(self, _) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple_of(self, n: int) -> None:
        items = self._stack[-n:]
        if len(items) < n:
            raise _Refused("a damaged pickle: a tuple of nothing")
        self._stack[-n:] = [tuple(items)]

    def _tuple1(self, _) -> None:
        self._tuple_of(1)

    def _tuple2(self, _) -> None:
        self._tuple_of(2)

    def _tuple3(self, _) -> None:
        self._tuple_of(3)

    def _append(self, _) -> None:
        item = self._stack.pop()
        self._top_list().append(item)

    def _appends(self, _) -> None:
        items = self._since_mark()
        self._top_list().extend(items)

    def _top_list(self) -> list:
        if type(self._stack[-1]) is not list:
            raise _Refused("a damaged pickle: items of no list")
        return self._stack[-1]

    def _setitem(self, _) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self, _) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise _Refused("a damaged pickle: items of no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Anything else could be a tuple of itself, whose hash takes for ever.
            if not isinstance(key, (str, int)):
                raise _Refused(f"a key of type {type(key).__name__}")
            if key in target:
                raise _Refused(f"the key {key!r} twice"[:200])
            target[key] = value

    def _build(self, _) -> None:
        self._stack.pop()  # the attributes of an OrderedDict: `_metadata`, the versions of modules
        if type(self._stack[-1]) is not OrderedDict:
            raise _Refused("attributes of something else than an OrderedDict")

    def _global(self, argument) -> None:
        module, _, name = argument.partition(" ")
        if module == "torch" and name in _STORAGES:
            self._stack.append(_STORAGES[name])
        elif (module, name) in _CALLS:
            self._stack.append(_Call(_CALLS[module, name]))
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            self._stack.append(name)
        else:
            raise _Refused(f"it names {module}.{name}"[:200])

    def _stack_global(self, _) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _Refused("a damaged pickle: a name that is no text")
        self._global(f"{module} {name}")

    def _reduce(self, _) -> None:
        arguments, call = self._stack.pop(), self._stack.pop()
        if not isinstance(call, _Call) or not isinstance(arguments, tuple):
            raise _Refused("it calls something that is no function of torch.save's")
        self._stack.append(call.build(*arguments))

    def _binpersid(self, _) -> None:
        kind, dtype, key, _place, numel = self._stack.pop()
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise _Refused("a storage that cannot be read")
        held = self._records.get(f"data/{key}")
        if held is None or not is_integer(numel) or numel * dtype.itemsize != held.file_size:
            raise _Refused(f"storage {key!r} claims other bytes than its record holds"[:200])
        self._stack.append(_Storage(dtype, key, numel))


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


def _tensor(storage, offset, size, stride, *_) -> Stored:
    """`torch._utils._rebuild_tensor_v2`."""
    good = isinstance(storage, _Storage) and is_integer(offset) and isinstance(size, tuple)
    if not good or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > 8:
        raise _Refused("a tensor that cannot be read")
    if not all(is_integer(x) for x in (*size, *stride)):
        raise _Refused("a tensor with sizes that are no integers")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else 0
    if count > storage.numel or (count and last >= storage.numel):
        raise _Refused(f"a tensor of shape {size} in a storage of {storage.numel:,} elements")
    return Stored(storage.dtype, storage.key, offset if count else 0, size, stride)


def _parameter(data, *_) -> Stored:
    """`torch._utils._rebuild_parameter`."""
    if not isinstance(data, Stored):
        raise _Refused("a parameter of no tensor")
    return data


def _ordered() -> OrderedDict:
    return OrderedDict()


_CALLS = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): lambda sizes: sizes,
    ("torch", "device"): lambda *parts: parts,
}
_CONSTANTS = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict, "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}  # fmt: skip
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
