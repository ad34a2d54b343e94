"""Files that are read: what is no regular file is refused or streamed, and nothing is read beyond a limit."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import ConfigError, HybridError
from hybrid.files.places import descriptor_of, kind_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True)
class Reading:
    """How files of a kind are read, and what is said of one that cannot be.

    limit: bytes at most. advice: what to do about it. streams: whether it may be a pipe or a device, as
    `<(zcat trace.csv.gz)` and /dev/stdin are. prefix: a flag, to be said before the path.
    """

    limit: int
    advice: str
    streams: bool = True
    prefix: str = ""
    error: type[HybridError] = ConfigError

    def name(self, path: Path) -> str:
        return f"{self.prefix} {path}".lstrip()

    def refuse(self, path: Path, problem: str) -> HybridError:
        return self.error(f"{self.name(path)}: {problem}; {self.advice}")


@contextmanager
def input_file(path: Path, reading: Reading) -> Iterator[io.BufferedReader[Any]]:
    """A file to read from, once. Whatever keeps it from being read, its length too, is a named error.

    A pipe that nobody writes to is empty, and is not waited for.
    """
    with _errors(path, reading), io.BufferedReader(_Bounded(_open(path, reading), path, reading)) as file:
        yield file


@contextmanager
def input_descriptor(path: Path, reading: Reading) -> Iterator[int]:
    """The same as a descriptor: to be mapped, or read at places."""
    with _errors(path, reading):
        descriptor = _open(path, reading)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def _errors(path: Path, reading: Reading) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise reading.refuse(path, "there is no such file") from None
    except OSError as error:
        raise reading.refuse(path, f"cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise reading.refuse(path, "needs more memory than there is") from None


def read_file(path: Path, reading: Reading) -> bytes:
    """All of a file."""
    with input_file(path, reading) as file:
        return file.read()


def _open(path: Path, reading: Reading) -> int:
    """A descriptor of our own for a path that may be read."""
    try:
        own = descriptor_of(path)
    except ValueError as error:  # a name that no file can have
        raise reading.refuse(path, f"cannot be read ({error})") from None
    _check(path, reading, os.stat(path) if own is None else os.fstat(own))  # a device is not opened to be refused
    if own is not None:
        return os.dup(own)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        _check(path, reading, os.fstat(descriptor))
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(path: Path, reading: Reading, status: os.stat_result) -> None:
    """Raise the error of `reading` unless such a file may be read."""
    if stat.S_ISREG(status.st_mode):
        if status.st_size > reading.limit:
            raise reading.refuse(path, f"has {status.st_size / 1e6:,.0f} MB, {reading.limit / 1e6:,.0f} are allowed")
    elif not reading.streams or not (stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        raise reading.refuse(path, f"is {kind_of(status)} and no regular file")


class _Bounded(io.RawIOBase):
    """The bytes of a descriptor, which it closes. More than the limit is an error: a device may never end, and a file
    may grow while it is read.
    """

    def __init__(self, descriptor: int, path: Path, reading: Reading) -> None:
        self._descriptor, self._path, self._reading = descriptor, path, reading
        self._left = reading.limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        count = os.readv(self._descriptor, [buffer])
        self._left -= count
        if self._left < 0:
            raise self._reading.refuse(self._path, f"is longer than the {self._reading.limit / 1e6:,.0f} MB allowed")
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
