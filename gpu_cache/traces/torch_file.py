"""Files of `torch.save` without torch, and without running what is in them.

Such a file is a ZIP archive: `data.pkl` says how the object is made, and a member of its own has the numbers of each
tensor. A pickle is a program that may call anything; here its instructions are only looked at, the few that make
dictionaries, lists, numbers, texts and tensors are followed, and every other one is refused.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.traces.base import MAX_VALUES, archive_errors

_STORAGES = {
    "torch LongStorage": "i8",
    "torch IntStorage": "i4",
    "torch ShortStorage": "i2",
    "torch CharStorage": "i1",
    "torch ByteStorage": "u1",
    "torch BoolStorage": "u1",
    "torch DoubleStorage": "f8",
    "torch FloatStorage": "f4",
    "torch HalfStorage": "f2",
}
_TENSOR, _ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_MARK = object()
_MAX_DIMENSIONS = 8


class _Global(NamedTuple):
    """A name that the file mentions. Nothing is imported for it."""

    name: str


@dataclass(frozen=True)
class Tensor:
    """Where the numbers of a tensor are: the member of the archive, their type, the first one, shape and strides."""

    member: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """What a file of `torch.save` holds: `value`, in which tensors are read by `array`. name: for errors.

    Raises CacheError for what is no such file, is damaged, or needs more than data.
    """

    def __init__(self, whole: bytes, name: str) -> None:
        self._name = name
        with archive_errors(name, "file of torch.save"):
            self._archive = zipfile.ZipFile(io.BytesIO(whole))
            self._folder = self._archive.namelist()[0].removesuffix("data.pkl")
            program = self._member("data.pkl")
            self._order = "<" if self._member("byteorder", b"little") == b"little" else ">"
            self.value = _Program(name).run(program)

    def array(self, value: Any) -> NDArray[Any]:
        """The numbers of a tensor."""
        if not isinstance(value, Tensor):
            raise CacheError(f"{self._name}: has {str(value)[:40]!r} where a tensor belongs")
        data, dtype = self._member(f"data/{value.member}"), np.dtype(f"{self._order}{value.dtype}")
        if len(data) % dtype.itemsize:
            raise CacheError(
                f"{self._name}: data/{value.member} has {len(data)} bytes, no whole numbers; copy it again"
            )
        numbers = np.frombuffer(data, dtype)
        last = value.offset + sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))
        if 0 in value.shape:
            return np.zeros(value.shape, value.dtype)
        if last >= len(numbers):
            raise CacheError(f"{self._name}: has a tensor of {value.shape} in {len(numbers)} numbers; copy it again")
        step = numbers.itemsize
        strides = [stride * step for stride in value.strides]
        return np.lib.stride_tricks.as_strided(numbers[value.offset :], value.shape, strides, writeable=False)

    def _member(self, path: str, default: bytes | None = None) -> bytes:
        try:
            about = self._archive.getinfo(self._folder + path)
        except KeyError:
            if default is None:
                raise CacheError(f"{self._name}: lacks {path}; copy the whole file") from None
            return default
        if about.file_size > 8 * MAX_VALUES or about.compress_type != zipfile.ZIP_STORED:
            raise CacheError(
                f"{self._name}: has {about.file_size} bytes of {path}, or compressed ones; torch has neither"
            )
        with archive_errors(self._name, "file of torch.save"):
            return self._archive.read(about)


class _Program:
    """Follows the instructions that `torch.save` writes for data, with a stack and a memory of what was made."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._stack: list[Any] = []
        self._memory: dict[int, Any] = {}
        self._does: dict[str, Callable[[Any], None]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "MARK": lambda _: self._stack.append(_MARK),
            "EMPTY_DICT": lambda _: self._stack.append({}),
            "EMPTY_LIST": lambda _: self._stack.append([]),
            "EMPTY_TUPLE": lambda _: self._stack.append(()),
            "NONE": lambda _: self._stack.append(None),
            "NEWTRUE": lambda _: self._stack.append(True),
            "NEWFALSE": lambda _: self._stack.append(False),
            "TUPLE": lambda _: self._stack.append(tuple(self._marked())),
            "TUPLE1": lambda _: self._stack.append(tuple(self._popped(1))),
            "TUPLE2": lambda _: self._stack.append(tuple(self._popped(2))),
            "TUPLE3": lambda _: self._stack.append(tuple(self._popped(3))),
            "APPEND": lambda _: self._append(self._popped(1)),
            "APPENDS": lambda _: self._append(self._marked()),
            "SETITEM": lambda _: self._set(self._popped(2)),
            "SETITEMS": lambda _: self._set(self._marked()),
            "GLOBAL": lambda argument: self._stack.append(_Global(argument)),
            "BINPERSID": lambda _: self._stack.append(self._storage(self._popped(1)[0])),
            "REDUCE": lambda _: self._stack.append(self._made(*self._popped(2))),
        }
        for kind in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            self._does[kind] = self._stack.append
        for kind in ("BINPUT", "LONG_BINPUT"):
            self._does[kind] = lambda argument: self._memory.__setitem__(argument, self._stack[-1])
        for kind in ("BINGET", "LONG_BINGET"):
            self._does[kind] = lambda argument: self._stack.append(self._memory[argument])

    def run(self, program: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    (value,) = self._stack
                    return value
                if opcode.name not in self._does:
                    raise self._refuse(f"the instruction {opcode.name}")
                self._does[opcode.name](argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{self._name}: is no whole file of torch.save ({error}); copy it again") from None
        raise CacheError(f"{self._name}: ends in the middle; copy the whole file")

    def _refuse(self, what: str) -> CacheError:
        return CacheError(
            f"{self._name}: needs {what[:80]}, which a record of numbers does not, and nothing in a file is run; "
            "export it as npz"
        )

    def _popped(self, count: int) -> list[Any]:
        found = self._stack[len(self._stack) - count :]
        if len(found) < count or any(value is _MARK for value in found):
            raise IndexError("too little on the stack")
        del self._stack[len(self._stack) - count :]
        return found

    def _marked(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def _append(self, values: list[Any]) -> None:
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        self._stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def _storage(self, said: Any) -> tuple[str, str]:
        """Member and type of numbers, of ("storage", kind, member, device, count)."""
        word, kind, member, *_ = said
        if word != "storage" or not isinstance(kind, _Global) or kind.name not in _STORAGES:
            raise self._refuse(f"numbers of the kind {getattr(kind, 'name', kind)}")
        if not isinstance(member, str) or not member.isascii() or not member.isalnum():
            raise ValueError("a tensor without a place")
        return member, _STORAGES[kind.name]

    def _made(self, made: Any, arguments: Any) -> Any:
        if made == _Global(_ORDERED) and arguments == ():
            return {}
        if made != _Global(_TENSOR):
            raise self._refuse(f"the function {made.name if isinstance(made, _Global) else made}")
        (member, dtype), offset, shape, strides, *_ = arguments
        numbers = (offset, *shape, *strides)
        if (
            len(shape) != len(strides)
            or len(shape) > _MAX_DIMENSIONS
            or not all(type(n) is int and n >= 0 for n in numbers)
        ):
            raise ValueError("a tensor of no shape")
        if math.prod(shape) > MAX_VALUES:
            raise ValueError(f"a tensor of {math.prod(shape)} numbers")
        return Tensor(member, dtype, offset, tuple(shape), tuple(strides))
