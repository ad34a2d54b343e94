"""Files that are written: whole or not at all, where a link leads, and never over what is not theirs to replace."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hybrid.errors import CapacityError, ConfigError, HybridError, WeightsError
from hybrid.files.places import descriptor_of, kind_of

_HEAD = 4096  # bytes that tell what a file is


@dataclass(frozen=True)
class FileKind:
    """Files that one may replace with another of the same kind. begins: whether the first 4 KiB are of it."""

    name: str
    begins: Callable[[bytes], bool]


def csv_kind(columns: Sequence[str]) -> FileKind:
    """CSV at least half of whose columns are ours, with a unit in their name or without: other versions had others."""

    def begins(head: bytes) -> bool:
        names = [name.strip() for name in head.decode("utf-8-sig", "replace").split("\n")[0].split(",")]
        ours = [name for name in names if name in columns or any(column.startswith(f"{name}_") for column in columns)]
        return 2 * len(ours) >= len(names)

    return FileKind(f"a CSV with the columns {', '.join(columns[:3])}, ...", begins)


class NewFile:
    """A file that gets its name once it is whole and on disk (`commit`), or none at all (`discard`); either once.

    A pipe, a device or a descriptor gets the bytes at once. Methods raise OSError.
    """

    def __init__(self, target: Path, status: os.stat_result | None = None, through: int | None = None) -> None:
        """target: without links. status: of what is replaced. through: a descriptor to write to instead."""
        self._target, self._status = target, status
        self._temporary: Path | None = None
        if through is None:
            self._temporary = target.with_name(f"{target.name[:60]}.{secrets.token_hex(4)}.tmp")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            through = os.open(self._temporary, flags, 0o666)
        self.file: BinaryIO = io.BufferedWriter(io.FileIO(through, "w"))

    def commit(self) -> None:
        self.file.flush()
        if self._temporary is None:
            return self.file.close()
        if self._status:
            self._keep_permissions(self._status)
        os.fsync(self.file.fileno())
        self.file.close()
        self._replace(self._temporary)
        sync_directory(self._target.parent)

    def discard(self) -> None:
        with suppress(OSError):  # what is buffered cannot be written
            self.file.close()
        if self._temporary:
            with suppress(OSError):  # of a folder that became read-only; the error that came first counts
                self._temporary.unlink(missing_ok=True)

    def _keep_permissions(self, status: os.stat_result) -> None:
        with suppress(OSError):  # only root may give a file away
            os.fchown(self.file.fileno(), status.st_uid, status.st_gid)
        os.fchmod(self.file.fileno(), stat.S_IMODE(status.st_mode) & 0o777)

    def _replace(self, temporary: Path) -> None:
        try:
            os.replace(temporary, self._target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            with open(temporary, "rb") as source, open(self._target, "wb") as target:  # a mounted file keeps its place
                shutil.copyfileobj(source, target)
            temporary.unlink()


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file of a folder of our own, which gets its name once it is whole; on any exception nothing is left.

    Raises `CapacityError` when the disk is full.
    """
    with disk_errors(path):
        new = NewFile(path)
    with _written(new, path):
        yield new.file


@contextmanager
def output_file(path: Path, kind: FileKind | None = None) -> Iterator[BinaryIO]:
    """A file that a user names: a device or a pipe is written through, a link is followed, and a regular file of this
    kind is replaced once the new one is whole.

    Raises ConfigError for all else, and CapacityError when the disk is full.
    """
    new = open_output(path, kind)
    with _written(new, path, ConfigError):
        yield new.file


def open_output(path: Path, kind: FileKind | None = None) -> NewFile:
    """The same for a file that is written piece by piece."""
    with disk_errors(path, ConfigError):
        own = descriptor_of(path)
        if own is not None:
            _check_writable(path, own)
            return NewFile(path, through=os.dup(own))
        status = _check(path, kind)
        if status is None or stat.S_ISREG(status.st_mode):
            return NewFile(Path(os.path.realpath(path)), status)
        return NewFile(path, through=_open_stream(path))


def check_output(flag: str, path: Path | None, kind: FileKind | None = None) -> None:
    """Raise ConfigError, which names the flag, unless `open_output` would find a place there. Nothing is written."""
    if path is None:
        return
    try:
        with disk_errors(path, ConfigError):
            own = descriptor_of(path)
            _check(path, kind) if own is None else _check_writable(path, own)
    except ConfigError as error:
        raise ConfigError(f"{flag} {error}") from None


def _check_writable(path: Path, descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise ConfigError(f"{path} is open for reading alone; name a file that may be written")


def _check(path: Path, kind: FileKind | None) -> os.stat_result | None:
    """The status of what is there; None: nothing yet. Raises ConfigError for what is not replaced nor written to."""
    target = Path(os.path.realpath(path))
    try:
        status = os.stat(path)
    except FileNotFoundError:
        _check_folder(path, target.parent)
        return None
    if stat.S_ISDIR(status.st_mode) or stat.S_ISBLK(status.st_mode) or stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"{path} is {kind_of(status)}; name a file that may be written")
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{path} is protected against writing; name another file")
    if stat.S_ISREG(status.st_mode):
        _check_folder(path, target.parent)
        if kind and status.st_size and not kind.begins(_head(target)):
            raise ConfigError(f"{path} is something else than {kind.name}, and is kept; name another file")
    return status


def _check_folder(path: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{path}: there is no directory {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: {folder} cannot be written; name another directory")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _open_stream(path: Path) -> int:
    """A pipe or a device, opened without waiting for a reader."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise ConfigError(f"{path}: nobody reads this pipe; start its reader first") from None
    os.set_blocking(descriptor, True)
    return descriptor


@contextmanager
def _written(new: NewFile, path: Path, error: type[HybridError] = WeightsError) -> Iterator[None]:
    """Commit what the body wrote, or discard it if there is any exception."""
    try:
        with disk_errors(path, error):
            yield
            new.commit()
    except BaseException:
        new.discard()
        raise


@contextmanager
def disk_errors(path: Path, named: type[HybridError] = WeightsError) -> Iterator[None]:
    """Turn an OSError of writing `path` into a named error."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"{path}: the disk is full ({reason}); free some space or write elsewhere") from None
        raise named(f"{path}: cannot be written ({reason}); choose a directory that can be written") from None


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
