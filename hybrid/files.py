"""Small files read with clear errors, and files written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hybrid.errors import CapacityError, WeightsError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `WeightsError` when it cannot be read or is something else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); give a complete model directory") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is not valid JSON ({_one_line(error)}); fetch the file again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: holds a {type(value).__name__}, not a JSON object; fetch the file again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name only once it is whole and on disk; on any exception nothing is left.

    Raises `CapacityError` when the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with disk_errors(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into a named error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"{path}: the disk is full ({error.strerror}); free some space or write elsewhere"
            ) from None
        raise WeightsError(
            f"{path}: cannot be written ({error.strerror}); choose a directory that can be written"
        ) from None


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
