"""The table of a rotary embedding: angles of the rows of a step, made once for all layers that turn by them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hybrid.models.layers.base import Place
from hybrid.models.layers.products import FP32
from hybrid.models.rope import RopeSpec, inverse_frequencies
from hybrid.ops import Buffer, Op


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
    yield Op("rope_table", "other", arguments, (0, "rows"))


def rope_constants(place: Place, rope: RopeSpec) -> dict[str, npt.NDArray[np.float32]]:
    return {f"{rope_name(place, rope)}.frequencies": inverse_frequencies(rope)[0]}


def rope_buffers(place: Place, rope: RopeSpec, rows: int) -> dict[str, int]:
    table = rope_name(place, rope)
    return {table: rows * rope.dim * FP32, f"{table}.frequencies": rope.dim // 2 * FP32}
