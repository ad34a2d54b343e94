"""The keys and values of the most recent tokens of every sequence, on the device. Their home is in the CPU's memory.

Each sequence has a ring: the token at position p lies at p modulo `capacity`. Evicting is overwriting: nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.models.spec import ModelSpec


class KvMirror:
    """bf16 rings of `capacity` tokens for `sequences` sequences, whatever the format of the home.

    A step's rows of a sequence must all fit: at most `capacity` of them.
    """

    def __init__(self, spec: ModelSpec, sequences: int, capacity: int, device: torch.device) -> None:
        self.capacity, self._device = capacity, device
        self._keys, self._values = (
            [self._ring(sequences, layer.attention.kv_heads, layer.attention.head_dim) for layer in spec.layers]
            for _ in range(2)
        )
        self._starts, self._ends = [0] * sequences, [0] * sequences

    @property
    def nbytes(self) -> int:
        return sum(ring.nbytes for ring in (*self._keys, *self._values))

    def extend(self, sequence: int, position: int, rows: int) -> tuple[int, int]:
        """`rows` tokens from `position` on will be written; returns which positions [start, end) are then mirrored.

        What the mirror has not seen, before a gap or a rewind, is left to the home.
        """
        start = self._starts[sequence]
        if not start <= position <= self._ends[sequence]:
            start = position
        end = position + rows
        self._starts[sequence], self._ends[sequence] = max(start, end - self.capacity), end
        return self._starts[sequence], end

    def forget(self, sequence: int) -> None:
        """What is mirrored of a sequence means nothing any more."""
        self._starts[sequence] = self._ends[sequence] = 0

    def write(self, layer: int, sequences: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """keys, values [rows, kv_heads, dim]; sequences [rows]; places [rows]: positions modulo the capacity."""
        self._keys[layer][sequences, :, places] = keys.bfloat16()
        self._values[layer][sequences, :, places] = values.bfloat16()

    def read(self, layer: int, rings: slice | Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """Keys and values bf16 [rings, kv_heads, keys, dim] of the first places of those rings; see `rings_of`."""
        k, v = (x[layer][:, :, :keys] for x in (self._keys, self._values))
        if isinstance(rings, slice):
            return k[rings], v[rings]
        return k.index_select(0, rings), v.index_select(0, rings)

    def _ring(self, sequences: int, heads: int, dim: int) -> Tensor:
        # zeros: a weight of 0 times what memory happened to hold could be NaN
        return torch.zeros(sequences, heads, self.capacity, dim, dtype=torch.bfloat16, device=self._device)


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
    """What `KvMirror.read` takes for them: adjacent ones are viewed, others gathered by number, int64 [sequences]."""
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
