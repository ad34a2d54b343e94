"""Which experts the rows of a step chose, told while the step runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.core import Batch

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
# (step, MoE layer, sequence [rows], position [rows], experts [rows, top_k] in rank order, their gate scores)
RouteObserver = Callable[[int, int, Ints, Ints, Ints, Floats], None]


class Routes:
    """Reads what the router wrote. `ids` and `weights` are those of the layer at hand, [rows * top_k] in rows; they
    belong to the engine and change with the layer.

    A sequence is numbered when its first token comes. observer: called in every MoE layer; None: nobody is told.
    """

    def __init__(self, ids: int, weights: int, rows: int, top_k: int, slots: int) -> None:
        """ids, weights: addresses of the buffers."""
        self.observer: RouteObserver | None = None
        self.top_k = top_k
        self._all_ids = view(ids, (rows * top_k,), np.int32).data
        self._all_weights = view(weights, (rows * top_k,), np.float32).data
        self._sequence_of = np.zeros(slots, np.int32)
        self.reset()

    def reset(self) -> None:
        """Begin counting steps and sequences anew."""
        self.step, self._sequences = -1, 0
        self._sequence_of[:] = 0
        self.rows = 0
        self.ids, self.weights = self._all_ids[:0], self._all_weights[:0]

    def begin(self, batch: Batch) -> None:
        """A step begins."""
        self.step += 1
        self.rows = len(batch.slots)
        pairs = self.rows * self.top_k
        self.ids, self.weights = self._all_ids[:pairs], self._all_weights[:pairs]
        if self.observer is None:
            return
        for row in np.flatnonzero(batch.positions == 0):
            self._sequence_of[batch.slots[row]] = self._sequences
            self._sequences += 1
        self._sequence, self._positions = self._sequence_of[batch.slots], batch.positions

    def observe(self, layer: int) -> None:
        """The experts of a layer are chosen."""
        if self.observer is not None:
            shape = (self.rows, self.top_k)
            ids, weights = np.asarray(self.ids).reshape(shape), np.asarray(self.weights).reshape(shape)
            self.observer(self.step, layer, self._sequence, self._positions, ids, weights)


def view(address: int, shape: tuple[int, ...], dtype: type[Any]) -> npt.NDArray[Any]:
    """Memory that somebody else owns, as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, np.dtype(dtype)).reshape(shape)
