"""What all attention on a device shares: it attends to the tokens that it mirrors, and joins what the threads make of
older ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hybrid.gpu.attention import State, attend, finish, join, read_states
from hybrid.gpu.home import Home
from hybrid.gpu.inputs import Group, StepInputs
from hybrid.gpu.layers.base import Shared
from hybrid.gpu.mirror import Rings
from hybrid.models.layers.older_tokens import STATES

Made = TypeVar("Made")


@dataclass(frozen=True)
class StateShape:
    """Of the softmax states of a row: heads, dimensions of their values, and floats as the threads leave them."""

    heads: int
    value_dim: int
    floats: int


class MirroredMixer(ABC):
    """Base of a `DeviceMixer` whose threads attend to tokens that are not mirrored; both softmaxes are joined."""

    crosses = False

    def __init__(
        self,
        shared: Shared,
        rings: Rings,
        states: StateShape,
        window: int | None,
        scale: float,
        sinks: Tensor | None = None,
    ) -> None:
        """scale: of the scores. sinks: float32 [heads], see `finish`."""
        self._shared, self._read, self._states = shared, rings.read, states
        self._window, self._scale, self._sinks = window, scale, sinks

    @property
    def windows(self) -> frozenset[int | None]:
        return frozenset([self._window])

    def refill(self, home: Home, sequence: int, start: int, end: int) -> None:
        """Mirror what the threads keep of the tokens from `start` to `end` of a sequence."""
        positions = torch.arange(start, end, device=self._shared.link.device)
        self._mirror_home(home, sequence, start, end, positions % self._shared.capacity)

    @abstractmethod
    def _mirror_home(self, home: Home, sequence: int, start: int, end: int, places: Tensor) -> None:
        """places: int64 [tokens], of the ring."""

    def sees_older(self, inputs: StepInputs) -> bool:
        return inputs.older[self._window]

    def _attend_whole(self, q: Tensor, inputs: StepInputs) -> Tensor:
        """[rows, heads, dim] of q bf16 [rows, heads, dim], where every token that rows see is mirrored."""
        return _in_order([self._group(q, group, self._shared.attention) for group in inputs.groups], inputs)

    def _attend(self, q: Tensor, inputs: StepInputs) -> State:
        """States [rows, heads] over mirrored tokens."""
        states = [self._group(q, group, attend) for group in inputs.groups]
        return State(
            *(_in_order([getattr(state, name) for state in states], inputs) for name in ("values", "top", "total"))
        )

    def _finished(self, mixed: Tensor | State, inputs: StepInputs) -> Tensor:
        """[rows, heads, value_dim] of what was made over mirrored tokens, joined with the threads' states."""
        if isinstance(mixed, Tensor):
            return mixed
        if self.sees_older(inputs):
            shape = self._states
            buffer = self._shared.buffers.rows(STATES, torch.float32, inputs.rows, shape.floats)
            mixed = join(mixed, read_states(self._shared.link.to_device(buffer), shape.heads, shape.value_dim))
        return finish(mixed, self._sinks)

    def _group(
        self, q: Tensor, group: Group, attention: Callable[[Tensor, Tensor, Tensor, Tensor, float], Made]
    ) -> Made:
        k, v = self._read(group.rings, group.keys)
        queries = q[group.rows].unflatten(0, (len(group.sequences), -1))
        return attention(queries, k, v, group.seen[self._window], self._scale)


def _in_order(parts: Sequence[Tensor], inputs: StepInputs) -> Tensor:
    """[rows, ...] of parts [runs, rows of a run, ...], one a group."""
    if len(parts) == 1:
        return parts[0].flatten(0, 1)
    flat = torch.cat([part.flatten(0, 1) for part in parts])
    whole = torch.empty_like(flat)
    whole[torch.cat([group.rows for group in inputs.groups])] = flat
    return whole
