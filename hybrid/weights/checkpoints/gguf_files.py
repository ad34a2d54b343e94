"""The files of a GGUF model: one, or splits named NAME-00001-of-00003.gguf, and what their headers say together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError, WeightsError
from hybrid.files import is_file
from hybrid.files.gguf import SUFFIX, GgufHeader, damaged, is_gguf, read_gguf_header
from hybrid.weights.shard import Entry

_SPLIT = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True)
class Gguf:
    """A model. path: of the only or first file.

    whole: whether all bytes of the tensors are there; else `headers_of` has read what is, and `missing` is the number
    of files that are not.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    whole: bool = True
    missing: int = 0


def gguf_files(path: Path) -> list[Path]:
    """All files of the model that one file belongs to. Raises WeightsError if one is missing."""
    files = split_names(path)
    for file in files:
        if len(files) > 1 and not is_file(file):
            advice = "fetch all files of the model again"
            raise WeightsError(f"{file}: missing, one of {len(files)} files of a model; {advice}")
    return files


def split_names(path: Path) -> list[Path]:
    """What all files of the model that one file belongs to are called."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 0 < int(match["number"]) <= count:
        raise damaged(path, f"is named as part {int(match['number'])} of {count}")
    return [path.with_name(f"{match['name']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def read_gguf(path: Path) -> Gguf:
    """The headers of all files of a model, as one. Raises WeightsError."""
    headers = [read_gguf_header(file) for file in gguf_files(path)]
    first = headers[0]
    if len(headers) == 1 and _number(first, _COUNT, 1) > 1:
        raise WeightsError(
            f"{path}: is one of {first.metadata[_COUNT]} files; they must keep their names, as NAME-00001-of-00003.gguf"
        )
    tensors = _joined(dict(enumerate(headers)), len(headers))
    if _number(first, _TENSORS, len(tensors)) != len(tensors):
        raise damaged(first.path, f"tells of {first.metadata[_TENSORS]} tensors in all, there are {len(tensors)}")
    return Gguf(first.path, first.metadata, tensors)


def headers_of(path: Path) -> Gguf:
    """The same from headers without tensors behind them, and without the files that are not there.

    The first one must be: it alone says what the model is. A file of a split may have any name here. Raises
    WeightsError.
    """
    names = split_names(path)
    headers = {at: read_gguf_header(file, whole=False) for at, file in enumerate(names) if is_file(file)}
    if 0 not in headers:
        raise WeightsError(f"{names[0]}: missing; it says what the model is: fetch its header, too")
    first = headers[0]
    count = len(names) if len(names) > 1 else max(1, _number(first, _COUNT, 1))
    if count > 1 and _number(first, _NUMBER, -1) != 0:
        raise WeightsError(f"{path}: is not the first of {count} files of a model, which says what the model is")
    tensors = _joined(headers, count)
    if _number(first, _TENSORS, len(tensors)) < len(tensors):
        raise damaged(first.path, f"tells of {first.metadata[_TENSORS]} tensors in all, there are {len(tensors)}")
    return Gguf(first.path, first.metadata, tensors, whole=False, missing=count - len(headers))


def _joined(headers: Mapping[int, GgufHeader], count: int) -> dict[str, Entry]:
    """The tensors of all files. headers: by the place of their file among `count` ones. Raises WeightsError."""
    tensors: dict[str, Entry] = {}
    for number, header in headers.items():
        if count > 1 and (_number(header, _NUMBER, -1), _number(header, _COUNT, -1)) != (number, count):
            raise damaged(header.path, f"does not say that it is part {number + 1} of {count}")
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise damaged(header.path, f"has tensor {name:.100}, which is in {tensors[name].path.name} too")
            tensors[name] = Entry(header.path, tensor.type, tensor.shape, tensor.start, tensor.end)
    return tensors


def gguf_in(folder: Path) -> Path | None:
    """The only GGUF model of a folder, None where there is none. Raises ConfigError if there are several."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX and is_gguf(path))
    models = [name for name in names if _is_first(name)]
    if len(models) > 1:
        shown = ", ".join(models[:8]) + (", ..." if len(models) > 8 else "")
        raise ConfigError(f"{folder}: holds {len(models)} GGUF models; give the path of one: {shown}")
    return folder / models[0] if models else None


def _is_first(name: str) -> bool:
    """Whether a model is named by this file: by the only or first one; projectors of images are none."""
    match = _SPLIT.fullmatch(name)
    return (match is None or int(match["number"]) == 1) and not name.startswith("mmproj")


def _number(header: GgufHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int:
        raise damaged(header.path, f"has {key} {value!r:.40}, it must be a number")
    return value
