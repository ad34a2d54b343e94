"""A file of results: an object a line, which later sweeps do not replay again."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError
from hybrid.files import Reading, disk_errors, read_file

Row = dict[str, Any]
RESULTS = Reading(1 << 30, "name another file", streams=False)


class KeptResults:
    """Results by the name of what they depend on. path: None keeps nothing; flag: that named it."""

    def __init__(self, path: Path | None, flag: str = "") -> None:
        """Raises ConfigError for a file that is something else, or that cannot be written."""
        self._path = path
        reading = replace(RESULTS, prefix=flag)
        self._rows: dict[str, Row] = {}
        if path is None:
            return
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"{reading.name(path)}: there is no directory {path.parent}; make it first")
        if os.path.lexists(path):
            data = read_file(path, reading)
            self._rows = {entry["name"]: entry["result"] for entry in read_entries(data)}
            if data.strip() and not any(map(_is_ours, data.splitlines())):
                raise reading.refuse(path, "is something else than results of hybrid simulate, and is kept")
            if not os.access(path, os.W_OK):
                raise reading.refuse(path, "is protected against writing")

    def get(self, name: str) -> Row | None:
        return self._rows.get(name)

    def add(self, name: str, row: Row, trace: str, code: str) -> None:
        if self._path is None:
            return
        entry = {"name": name, "trace": trace, "code": code, "result": row}
        text = json.dumps({**entry, "checksum": _checksum(entry)}) + "\n"
        with disk_errors(self._path, ConfigError), open(self._path, "a+b") as file:
            if file.tell() and not _ends_a_line(file):  # the last line was cut off
                text = "\n" + text
            file.write(text.encode())


def read_entries(data: bytes) -> Iterator[Row]:
    """The whole lines of such a file; one that was cut off or changed is none."""
    for line in data.splitlines():
        entry = _parse(line)
        if not isinstance(entry, dict) or entry.pop("checksum", None) != _checksum(entry):
            continue
        if isinstance(entry.get("name"), str) and isinstance(entry.get("result"), dict):
            yield entry


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_ours(line: bytes) -> bool:
    """Also of a version whose results had no checksum, or with a mark of an editor before it."""
    return line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b'{"name": "')


def _checksum(entry: Row) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
