"""Keys and values: one reservation of address space, committed as it is touched and given back sequence by sequence."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.engine.saved import Saved
from hybrid.errors import CapacityError
from hybrid.machine.hardware import has_huge_pages
from hybrid.plan.kv_layout import KvPlan
from hybrid.plan.plan import Plan

HUGE_BEHIND = 8 << 20  # bytes of a run in small pages, so that a short sequence costs what it uses
MAX_HUGE_RUNS = 8000  # each makes two ranges of memory, and a process may have 65530


class KvArena:
    """The KV of `plan.sequences` sequences, zeroed when new and when released.

    Zeroed matters: a masked key has weight 0, and 0 times a stale infinity would be NaN. A run, the keys or values of
    one head, has huge pages behind its first 8 MiB: the 2 MiB that its end may waste are then at most a quarter of it.
    huge_runs: how many got them; long_runs: how many are long enough.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._fixed = [
            (start + offset, size)
            for start, layer in zip(plan.kv.offsets, plan.kv.layers, strict=True)
            for offset, size in (layer.fixed if layer.token_bytes else ((0, layer.nbytes),))
        ]
        self._runs = list(_token_runs(plan.kv))
        self._widths = [width for _, width in self._runs]
        size = plan.sequences * plan.kv.sequence_stride
        try:
            self._arena = cpu_kernels.Arena(size)
        except MemoryError:
            raise CapacityError(
                f"{size / 1e9:.1f} GB of address space for KV cannot be reserved; lower --max-seq-len or --max-batch"
            ) from None
        tails = list(_tails(plan.kv))
        self.long_runs = plan.sequences * len(tails)
        self.huge_runs = self._use_huge(tails) if has_huge_pages(plan.huge_pages) else 0

    def _use_huge(self, tails: list[tuple[int, int]]) -> int:
        """Request huge pages sequence by sequence until the limit is reached; returns how many tails have them."""
        stride = self._plan.kv.sequence_stride
        places = [
            (sequence * stride + offset, size) for sequence in range(self._plan.sequences) for offset, size in tails
        ]
        refused = (i for i, place in enumerate(places[:MAX_HUGE_RUNS]) if not self._arena.use_huge(*place))
        return next(refused, min(len(places), MAX_HUGE_RUNS))

    @property
    def address(self) -> int:
        """Of the states of all sequences."""
        return int(self._arena.address)

    def layout(self, layer: int, offset: int = 0) -> Any:
        """The state of a layer from `offset` bytes on as the kernels read it, an object of a class of `cpu_kernels`."""
        return self._plan.kv.bound(layer, self.address, offset)

    def repeat(self, sequence: int, known: int, tokens: int) -> None:
        """Copy the first `known` tokens of a sequence over those behind them, up to `tokens`.

        For measurements, which need memory that holds keys and values, whatever they say. known: a multiple of
        KEY_BLOCK.
        """
        for run, width in self._places(sequence):
            for first in range(known, tokens, known):
                ctypes.memmove(run + first * width, run, min(known, tokens - first) * width)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy keys and values of the first `tokens` tokens of a sequence to another one, which has none.

        tokens: a multiple of BLOCK, the tokens whose keys lie together: none of another token is copied.
        """
        for (known, width), (place, _) in zip(self._places(source), self._places(target), strict=True):
            ctypes.memmove(place, known, tokens * width)

    def save(self, sequence: int, start: int, stop: int) -> Saved:
        """A copy of keys and values of the tokens from `start` to `stop` of a sequence.

        start, stop: multiples of BLOCK, as of `copy`. Raises OSError when there is no memory left.
        """
        saved = self.blank(stop - start)
        for target, (run, width) in zip(saved.runs(), self._places(sequence), strict=True):
            ctypes.memmove(target, run + start * width, saved.tokens * width)
        return saved

    def blank(self, tokens: int) -> Saved:
        """Memory for so many tokens outside of any sequence. Raises OSError when there is none left."""
        return Saved(self._widths, tokens)

    def load(self, saved: Saved, sequence: int, start: int, tokens: int) -> None:
        """Put the first `tokens` tokens of what was saved into a sequence, from its token `start` on."""
        for source, (run, width) in zip(saved.runs(), self._places(sequence), strict=True):
            ctypes.memmove(run + start * width, source, tokens * width)

    def _places(self, sequence: int) -> Iterator[tuple[int, int]]:
        """(address, bytes of a token) of every run of a sequence."""
        first = self.address + sequence * self._plan.kv.sequence_stride
        return ((first + offset, width) for offset, width in self._runs)

    def snapshot(self, sequence: int) -> npt.NDArray[np.uint8]:
        """A copy of what a sequence has that does not grow: the states of recurrent layers; empty if there are none.

        Together with keys and values, which later tokens do not change, it is the whole state after the tokens so far.
        """
        saved = np.empty(sum(size for _, size in self._fixed), np.uint8)
        for place, part in self._parts(sequence, saved):
            ctypes.memmove(part.ctypes.data, place, part.nbytes)
        return saved

    def restore(self, sequence: int, saved: npt.NDArray[np.uint8]) -> None:
        """Put back what `snapshot` made, of this sequence or of another one with the same first tokens.

        Raises ValueError for what no snapshot of this model is.
        """
        size = sum(size for _, size in self._fixed)
        if saved.dtype != np.uint8 or saved.shape != (size,):
            raise ValueError(f"{saved.dtype} {list(saved.shape)} is no snapshot; it must be uint8 [{size}]")
        for place, part in self._parts(sequence, np.ascontiguousarray(saved)):
            ctypes.memmove(place, part.ctypes.data, part.nbytes)

    def _parts(self, sequence: int, saved: npt.NDArray[np.uint8]) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Addresses of the parts of a sequence that do not grow, and where a snapshot has them."""
        if not 0 <= sequence < self._plan.sequences:
            raise ValueError(f"sequence {sequence}; it must be from 0 to {self._plan.sequences - 1}")
        first = 0
        for offset, size in self._fixed:
            place = self.address + sequence * self._plan.kv.sequence_stride + offset
            yield place, saved[first : first + size]
            first += size

    def release(self, sequence: int) -> None:
        """Give the memory of a sequence back to the system."""
        self._arena.clear(sequence * self._plan.kv.sequence_stride, self._plan.kv.sequence_stride)


def _token_runs(kv: KvPlan) -> Iterator[tuple[int, int]]:
    """(offset in a sequence, bytes of a token) of every run."""
    for start, layer in zip(kv.offsets, kv.layers, strict=True):
        for offset, size in layer.runs:
            yield start + offset, size // kv.tokens


def _tails(kv: KvPlan) -> Iterator[tuple[int, int]]:
    """(offset in a sequence, bytes) of what lies behind the first `HUGE_BEHIND` bytes of every long run."""
    for start, layer in zip(kv.offsets, kv.layers, strict=True):
        for offset, size in layer.runs:
            if size > HUGE_BEHIND:
                yield start + offset + HUGE_BEHIND, size - HUGE_BEHIND
