"""Folders that one owner at a time uses, who says in them who it is."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hybrid.errors import CapacityError, ConfigError, WeightsError
from hybrid.files.writing import disk_errors
from hybrid.printable import printable

_NAME = "lock"
_MAX_OWNER = 300  # bytes read of what is to say who holds a lock


class FolderLock:
    """A folder, made where it is missing and then readable by its owner alone, is held until `release`. flag: what
    named it, for errors.

    Raises WeightsError for a folder that cannot be written or whose file system has no locks, ConfigError for one that
    is held, with who holds it.
    """

    def __init__(self, folder: Path, flag: str) -> None:
        with _named(folder, flag):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with _named(folder, flag):
                self._lock(flag)
        except BaseException:
            os.close(self._descriptor)
            raise
        with suppress(OSError):  # a full disk: who holds it is not known then
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Let it go; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing it would not unlock what a forked process still has open
        os.close(descriptor)

    def _lock(self, flag: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{flag} is used by {self._owner()}; give each its own, or end that one") from None

    def _owner(self) -> str:
        """Who holds it, as far as that is written."""
        process, *host = os.pread(self._descriptor, _MAX_OWNER, 0).decode(errors="replace").split() or [""]
        if not process.isdecimal():
            return "another process"
        if host != [socket.gethostname()]:
            return f"process {process} on {printable(' '.join(host))}"
        return "another model of this process" if int(process) == os.getpid() else f"process {process}"


@contextmanager
def _named(folder: Path, flag: str) -> Iterator[None]:
    """As `disk_errors`, with what named the folder."""
    try:
        with disk_errors(folder):
            yield
    except (WeightsError, CapacityError) as error:
        raise type(error)(f"{flag}: {error}") from None
