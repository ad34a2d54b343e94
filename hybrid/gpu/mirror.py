"""The keys and values of the most recent tokens of every sequence, on the device. Their home is in the CPU's memory.

Each sequence has a ring: the token at position p lies at p modulo `capacity`. Overwriting a token loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class KvMirror:
    """Which tokens of `sequences` sequences are mirrored: the most recent ones, at most `capacity` of each.

    A step's rows of a sequence must all fit: at most `capacity` of them.
    """

    def __init__(self, sequences: int, capacity: int) -> None:
        self.capacity = capacity
        self._starts, self._ends = [0] * sequences, [0] * sequences

    def extend(self, sequence: int, position: int, rows: int) -> tuple[int, int]:
        """`rows` tokens from `position` on will be written; returns which positions [start, end) are then mirrored.

        What the mirror does not have, before a gap or a rewind, is left to the home; see `missing`.
        """
        start = self._starts[sequence]
        if not start <= position <= self._ends[sequence]:
            start = position
        end = position + rows
        self._starts[sequence], self._ends[sequence] = max(start, end - self.capacity), end
        return self._starts[sequence], end

    def missing(self, sequence: int, position: int, rows: int) -> tuple[int, int]:
        """Which positions [start, end) before `position` there is a place for beside `rows` tokens from there on, and
        are not mirrored: what was written without the device, or has been overwritten by tokens that are dropped now.
        """
        start = max(0, position + rows - self.capacity)
        known = self._starts[sequence] <= position <= self._ends[sequence]
        return start, max(start, self._starts[sequence] if known else position)

    def refill(self, sequence: int, start: int, end: int) -> None:
        """What is `missing` has been written."""
        if not self._starts[sequence] <= end <= self._ends[sequence]:
            self._ends[sequence] = end
        self._starts[sequence] = start

    def forget(self, sequence: int) -> None:
        """Drop the mirrored tokens of a sequence."""
        self._starts[sequence] = self._ends[sequence] = 0


class Rings(Protocol):
    """The mirrored keys and values of a layer, bf16 whatever the home has."""

    @property
    def nbytes(self) -> int: ...

    def read(self, rings: slice | Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rings, heads, keys, dim] of the first places of those rings; see `rings_of`."""


class KvRings:
    """`Rings` of keys and values [sequences, heads, capacity, dim]."""

    def __init__(self, sequences: int, heads: int, capacity: int, dim: int, device: torch.device) -> None:
        shape = (sequences, heads, capacity, dim)
        self.keys, self.values = _new_ring(shape, device), _new_ring(shape, device)

    @property
    def nbytes(self) -> int:
        return int(self.keys.nbytes + self.values.nbytes)

    def write(self, sequences: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values [rows, heads, dim]; sequences [rows]; places [rows]: positions modulo the capacity."""
        self.keys[sequences, :, places] = keys.bfloat16()
        self.values[sequences, :, places] = values.bfloat16()

    def read(self, rings: slice | Tensor, keys: int) -> tuple[Tensor, Tensor]:
        return _first_places(self.keys, rings, keys), _first_places(self.values, rings, keys)


class LatentRings:
    """`Rings` of one row a token [sequences, 1, capacity, dim]: the key of all heads, whose first `rank` dimensions are
    their value too.
    """

    def __init__(self, sequences: int, capacity: int, dim: int, rank: int, device: torch.device) -> None:
        self.rows, self._rank = _new_ring((sequences, 1, capacity, dim), device), rank

    @property
    def nbytes(self) -> int:
        return int(self.rows.nbytes)

    def write(self, sequences: Tensor, places: Tensor, rows: Tensor) -> None:
        """rows [rows, dim]; sequences, places as of `KvRings`."""
        self.rows[sequences, 0, places] = rows.bfloat16()

    def read(self, rings: slice | Tensor, keys: int) -> tuple[Tensor, Tensor]:
        rows = _first_places(self.rows, rings, keys)
        return rows, rows[..., : self._rank]


def _new_ring(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Zeros: a weight of 0 times what memory happened to hold could be NaN."""
    return torch.zeros(shape, dtype=torch.bfloat16, device=device)


def _first_places(ring: Tensor, rings: slice | Tensor, keys: int) -> Tensor:
    first = ring[:, :, :keys]
    return first[rings] if isinstance(rings, slice) else first.index_select(0, rings)


@dataclass(frozen=True)
class Run:
    """Rows of one sequence in a step: the first of them, how many, the position of the first, what is mirrored then."""

    sequence: int
    row: int
    rows: int
    position: int
    start: int
    end: int


def rings_of(sequences: Sequence[int], device: torch.device) -> slice | Tensor:
    """What `KvRings.read` takes for them: adjacent ones are viewed, others gathered by number, int64 [sequences]."""
    if list(sequences) == list(range(sequences[0], sequences[0] + len(sequences))):
        return slice(sequences[0], sequences[0] + len(sequences))
    return torch.tensor(sequences, device=device)


def extents_of(runs: Sequence[Run], device: torch.device) -> Tensor:
    """int64 [runs, 3]: the start and end of what is mirrored, and the position of the first row."""
    extents = torch.tensor([[run.start, run.end, run.position] for run in runs])
    return extents.to(device, non_blocking=True)


def seen_places(extents: Tensor, rows: int, keys: int, capacity: int, window: int | None) -> Tensor:
    """bool [runs, rows, keys]: which of the first `keys` places of their rings the rows of runs of equal length see."""
    starts, ends, first = extents[:, :1], extents[:, 1:2], extents[:, 2:]
    last = (first + torch.arange(rows, device=extents.device))[..., None]
    newest = ends - 1
    held = newest - (newest - torch.arange(keys, device=extents.device)) % capacity  # the position that a place holds
    seen = (held >= starts)[:, None] & (held[:, None] <= last)
    return seen if window is None else seen & (held[:, None] > last - window)
