"""Reports which experts the rows of a step chose, or overrides the choice from a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.core import Batch
from hybrid.machine.memory import view
from hybrid.plan.route_trace import RouteTrace

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
# (step, MoE layer, sequence [rows], position [rows], experts [rows, top_k] in rank order, their gate scores, what the
# next layer's router said early [rows, top_k] or None)
RouteObserver = Callable[[int, int, Ints, Ints, Ints, Floats, Ints | None], None]


class Routes:
    """Reads the router's output. `ids` and `weights` are those of the current layer, [rows * top_k], row after row.
    They are buffers of the engine, which every MoE layer overwrites.

    A sequence is numbered at its first token. observer: called in every MoE layer, or None. taken: int32 [MoE layers,
    rows, top_k], the experts that a trace names for the current step; None without a trace.
    """

    def __init__(
        self, ids: int, weights: int, rows: int, top_k: int, sequences: int, trace: RouteTrace | None = None
    ) -> None:
        """ids, weights: addresses of the buffers. trace: its experts replace the chosen ones, at the routers'
        weights.
        """
        self.observer: RouteObserver | None = None
        self.taken: Ints | None = None
        self.trace = trace
        self.top_k = top_k
        self._all_ids = view(ids, (rows * top_k,), np.int32).data
        self._all_weights = view(weights, (rows * top_k,), np.float32).data
        self._number_of = np.zeros(sequences, np.int32)
        self.reset()

    def reset(self, sequences: int = 0) -> None:
        """Restart the count of steps at 0. sequences: the number of the next sequence."""
        self.step, self._next_number = -1, sequences
        self._number_of[:] = 0
        self.rows = 0
        self.ids, self.weights = self._all_ids[:0], self._all_weights[:0]

    @property
    def matter(self) -> bool:
        """Whether the experts of every token are recorded, or told by a trace: then each is computed, and once."""
        return self.observer is not None or self.trace is not None

    def begin(self, batch: Batch) -> None:
        """A step begins."""
        self.step += 1
        self.rows = len(batch.sequences)
        pairs = self.rows * self.top_k
        self.ids, self.weights = self._all_ids[:pairs], self._all_weights[:pairs]
        if not self.matter:
            return
        known = batch.sequences < len(self._number_of)  # the executor refuses others
        new = batch.sequences[(batch.positions == 0) & known]
        self._number_of[new] = self._next_number + np.arange(len(new))
        self._next_number += len(new)
        self._sequence, self._positions = self._number_of.take(batch.sequences, mode="clip"), batch.positions
        if self.trace is not None:
            self.taken = self.trace.routes(self._sequence, self._positions)

    def take(self, layer: int) -> None:
        """Replace the chosen experts of a layer with those of the trace."""
        assert self.taken is not None
        self.ids[:] = self.taken[layer].reshape(-1).data

    def observe(self, layer: int, early: Any = None) -> None:
        """Report the chosen experts of a layer to the observer. early: those that the next layer's router names,
        int32 [rows * top_k]; None where it was not asked.
        """
        if self.observer is not None:
            shape = (self.rows, self.top_k)
            ids, weights = np.asarray(self.ids).reshape(shape), np.asarray(self.weights).reshape(shape)
            named = None if early is None else np.asarray(early).reshape(shape)
            self.observer(self.step, layer, self._sequence, self._positions, ids, weights, named)
