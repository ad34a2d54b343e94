"""JSON that others wrote, read with clear errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid.errors import WeightsError
from hybrid.files.reading import Reading, read_file
from hybrid.files.writing import atomic_file

MODEL_FILE = Reading(64 << 20, "give a complete model directory", streams=False, error=WeightsError)
MAX_DEPTH = 64  # of nested lists and objects; what is deeper could be read and not be written again
_AGAIN = "fetch the file again"


def read_json_object(path: Path, reading: Reading = MODEL_FILE) -> dict[str, Any]:
    """The object in a JSON file. Raises the error of `reading` when it cannot be read or is something else."""
    data = read_file(path, reading)
    if reading is MODEL_FILE:
        reading = replace(reading, advice=_AGAIN)
    value = parse_json(data, path, reading)
    if not isinstance(value, dict):
        raise reading.refuse(path, f"holds a {type(value).__name__}, not a JSON object")
    if _is_deep(value):
        raise reading.refuse(path, f"is nested deeper than {MAX_DEPTH} levels")
    return value


def parse_json(data: bytes | str, path: Path, reading: Reading) -> Any:
    """The value of a JSON text, whatever is wrong with it a named error: its depth and its numbers, too."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise reading.refuse(path, f"is not valid JSON ({' '.join(str(error).split())})") from None
    except MemoryError:
        raise reading.refuse(path, "needs more memory than there is") from None


def _is_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in children for child in items if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode())
