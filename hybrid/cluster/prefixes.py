"""What a client repeats when its conversation goes on, as the marks by which it is recognised."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

# In the order in which a model reads them, whichever API names them.
_FIELDS = ("tools", "system", "instructions", "messages", "input", "prompt")
_LISTS = ("messages", "input")  # of which a longer conversation has more items
_IGNORED = ("cache_control",)  # clients move it to the newest message
BLOCK = 1024  # bytes of a text between two marks


@dataclass(frozen=True)
class Prefix:
    """marks: one for each piece that the conversation begins with, ascending. sizes: bytes up to and with each."""

    marks: tuple[bytes, ...] = ()
    sizes: tuple[int, ...] = ()


def prefix_of(body: Mapping[str, Any]) -> Prefix:
    """The marks of a request's body: equal as far as two of them begin alike."""
    marks, sizes = [], []
    last, size = b"", 0
    for block in _blocks(body):
        last = blake2b(block, key=last, digest_size=16).digest()
        size += len(block)
        marks.append(last)
        sizes.append(size)
    return Prefix(tuple(marks), tuple(sizes))


def _blocks(body: Mapping[str, Any]) -> Iterator[bytes]:
    for piece in _pieces(body):
        for begin in range(0, len(piece), BLOCK):
            yield piece[begin : begin + BLOCK]


def _pieces(body: Mapping[str, Any]) -> Iterator[bytes]:
    for name in _FIELDS:
        value = body.get(name)
        several = name in _LISTS and isinstance(value, list)
        for part in value if several and value else [value] if value else []:
            yield _bytes(part)


def _bytes(part: Any) -> bytes:
    """A text as it is, so that a longer one begins with it; all else as JSON."""
    text = part if isinstance(part, str) else json.dumps(_plain(part), ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if part is not None and name not in _IGNORED}
    return [_plain(part) for part in value] if isinstance(value, list) else value
