"""The table of a rotary embedding: angles of the rows of a step, made once for all layers that turn by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.models.layers.base import Place
from hybrid.models.layers.products import FP32
from hybrid.models.rope import RopeSpec, inverse_frequencies
from hybrid.ops import Buffer, Op

LENGTHS = "lengths"  # int32 [rows], of the sequence of each row: the engine writes it where a rope depends on it


def rope_name(place: Place, rope: RopeSpec) -> str:
    """The buffer of its table."""
    return f"rope{place.ropes.index(rope)}"


def rope_ops(place: Place, rope: RopeSpec) -> Iterator[Op]:
    """The op that writes its table."""
    table = rope_name(place, rope)
    arguments = {
        "inverse_frequencies": Buffer(f"{table}.frequencies"),
        "table": Buffer(table),
        "dim": rope.dim,
        "factor": inverse_frequencies(rope)[1],
    }
    if rope.long_above:
        arguments |= {
            "long_frequencies": Buffer(f"{table}.long_frequencies"),
            "lengths": Buffer(LENGTHS),
            "long_above": rope.long_above,
            "long_factor": inverse_frequencies(rope, long=True)[1],
        }
    yield Op("rope_table", "other", arguments, (0, "rows"))


def windows_name(place: Place, rope: RopeSpec, tokens: int) -> str:
    """The buffer of the table of windows of so many tokens: the angles of the first token of that which a row is in."""
    return f"{rope_name(place, rope)}.every{tokens}"


def windows_ops(place: Place, rope: RopeSpec, tokens: int) -> Iterator[Op]:
    """The op that writes that table."""
    (table,) = rope_ops(place, rope)
    windows = {"table": Buffer(windows_name(place, rope, tokens)), "every": tokens}
    yield replace(table, arguments=table.arguments | windows)


def growth_fields(rope: RopeSpec | None) -> dict[str, Any]:
    """What an op that makes queries is told of their growth."""
    growth = rope.growth if rope else None
    return {"growth": growth.beta, "growth_length": growth.length} if growth else {}


def rope_constants(place: Place, rope: RopeSpec) -> dict[str, npt.NDArray[np.float32]]:
    table = rope_name(place, rope)
    found = {f"{table}.frequencies": inverse_frequencies(rope)[0]}
    if rope.long_above:
        found[f"{table}.long_frequencies"] = inverse_frequencies(rope, long=True)[0]
    return found


def rope_buffers(place: Place, rope: RopeSpec, rows: int) -> dict[str, int]:
    table = rope_name(place, rope)
    sizes = {table: rows * rope.dim * FP32, f"{table}.frequencies": rope.dim // 2 * FP32}
    if rope.long_above:
        sizes |= {f"{table}.long_frequencies": rope.dim // 2 * FP32, LENGTHS: rows * 4}
    return sizes
