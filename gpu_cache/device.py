"""Operations of a device. A call only issues the work; it may complete after the call returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
SlotIds = npt.NDArray[np.int32]
Pieces = Sequence[Bytes]  # of an expert: its matrices, then its biases if there are any
Observer = Callable[[str, float, float], None]  # "hits" or "copy", from when to when: seconds of time.perf_counter
STAGING = 2  # slots of a device that streams, besides those of the table: one is copied into, one computed from
Source = Callable[[int], Pieces]  # the pieces of the expert with this key, where they lie in the memory of the host


class Compute(Protocol):
    """Computes experts from the bytes of slots. The program that knows the model makes it, and the device calls it."""

    def __call__(self, slot_ids: SlotIds) -> None:
        """slot_ids: int32 [rows, top_k], the slot of the expert for that row and rank; -1 if the device does not hold
        it.

        Returns when the contributions of these experts are written.
        """


@dataclass
class DeviceTimes:
    """Seconds and bytes since the device was opened."""

    run: float = 0.0  # computing experts
    copy: float = 0.0  # copying experts, including waits for the configured rate
    copied_bytes: int = 0
    copies: int = 0
    failed_copies: int = 0
    streamed_bytes: int = 0
    streamed: int = 0  # experts that were copied for one run


class Device(Protocol):
    """Slots that hold experts, copies into slots, and runs of the experts in slots.

    One thread makes all calls. A slot is not written until every run that uses it is joined: the table pins it.
    """

    observer: Observer | None  # called by any thread, for every run and copy that has ended

    @property
    def times(self) -> DeviceTimes: ...

    def copy_in(self, slot: int, key: int) -> None:
        """Issue a copy of expert `key` into a slot; `poll` returns it when it has ended. Copies end in order."""

    def poll(self) -> list[tuple[int, bool]]:
        """(slot, whether it now holds its expert) of each copy that ended since the last call."""

    @property
    def pending(self) -> int:
        """Copies issued that `poll` has not yet returned."""

    def load(self, slot: int, key: int) -> None:
        """Copy an expert and wait until the slot holds it. For use before the first step."""

    def run(self, slot_ids: SlotIds, streamed: Sequence[int] = ()) -> Any:
        """Issue the experts of a layer, as for `Compute`; returns a ticket to join before the next run. slot_ids must
        not change until then.

        streamed: keys of experts in no slot; their ids follow those of the table's slots, in order. Each is copied to a
        streaming slot, computed once and dropped; `poll` does not report these copies.
        """

    @property
    def run_looked_up(self) -> Callable[[int, int], Any] | None:
        """Like `run`, for (key of the layer's expert 0, rows) when only the device knows the chosen experts. It looks
        them up itself and computes those that `load` or `poll` have reported ready. None if unsupported.
        """

    def join(self, ticket: Any) -> None:
        """Make the results of a run usable: by the host once this returns, or by work queued on the device afterwards.
        Raises an error of the run once; further calls do nothing.
        """

    def wait(self, ticket: Any) -> None:
        """Block until a joined run has ended; for timing."""

    def forget(self) -> None:
        """Mark every slot empty. No copy may be in flight."""

    def close(self) -> None:
        """End every thread and stream; copies in flight are dropped."""
