"""What a path leads to: a file, a pipe, a device, or a descriptor that this process has open."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hybrid.errors import WeightsError

_MAX_LINKS = 40  # as the system follows
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFBLK: "a disk",
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFREG: "a file",
}


def kind_of(status: os.stat_result) -> str:
    """What lies at a path, in words."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "no file")


def descriptor_of(path: Path) -> int | None:
    """The number of the open descriptor that /dev/stdout, /dev/fd/3 or a link to one of them stands for, else None.

    Opening such a path again would begin at the start of the file, under what is written there otherwise.
    """
    opened = os.path.realpath("/proc/self/fd")
    path = path.absolute()
    for _ in range(_MAX_LINKS):
        if path.name.isdecimal() and os.path.realpath(path.parent) == opened:
            return int(path.name)
        try:
            path = path.parent / os.readlink(path)
        except OSError:
            return None
    return None


def is_file(path: Path) -> bool:
    """Whether there is something other than a directory. Raises WeightsError if that cannot be told."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot be read ({error.strerror or error}); give a complete model directory that may be read"
        ) from None
    except ValueError as error:  # a name that no file can have
        raise WeightsError(f"{path}: cannot be read ({error}); give a complete model directory") from None


def is_stream(path: Path) -> bool:
    """Whether a path leads to a pipe, a device or an open descriptor, which are written through."""
    return descriptor_of(path) is not None or (path.exists() and not path.is_file() and not path.is_dir())
