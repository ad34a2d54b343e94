"""What a device must do for the cache. Nothing here has happened when a call returns: it has been asked for."""

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
    """Runs experts on the bytes of slots: made by the program that knows models, called by the device."""

    def __call__(self, slot_ids: SlotIds) -> None:
        """slot_ids: int32 [rows, top_k], the slot whose expert takes the row at that rank, -1 for none of ours.

        Returns when the contributions of these experts are written.
        """


@dataclass
class DeviceTimes:
    """Seconds and bytes since the device was opened."""

    run: float = 0.0  # computing experts
    copy: float = 0.0  # copying experts, the waiting for the configured rate included
    copied_bytes: int = 0
    copies: int = 0
    failed_copies: int = 0
    streamed_bytes: int = 0
    streamed: int = 0  # experts that a run brought with it


class Device(Protocol):
    """Slots that hold experts, copies into them and the computing of those that are there.

    One thread calls all of it. A slot is not written while a run that uses it has not been joined: the table pins it.
    """

    observer: Observer | None  # told, by any thread, of every run and copy once it has ended

    @property
    def times(self) -> DeviceTimes: ...

    def copy_in(self, slot: int, key: int) -> None:
        """Ask for a copy of expert `key` into a slot; `poll` tells when it has ended. Copies end in order."""

    def poll(self) -> list[tuple[int, bool]]:
        """(slot, whether it now holds its expert) of the copies that ended since the last call."""

    @property
    def pending(self) -> int:
        """Copies that `poll` has not told of."""

    def load(self, slot: int, key: int) -> None:
        """Copy at once, before steps run: returns when the slot holds its expert."""

    def run(self, slot_ids: SlotIds, streamed: Sequence[int] = ()) -> Any:
        """Ask for the experts of a layer, as `Compute` takes them; returns a ticket, which is joined before the next
        run. slot_ids belongs to the device until then.

        streamed: keys of experts that no slot holds. Their ids follow those of the table's slots, in this order; the
        device copies each into a slot of its own, computes it, and forgets it. `poll` does not tell of these copies.
        """

    @property
    def run_found(self) -> Callable[[int, int], Any] | None:
        """Like `run`, for rows whose experts are known on the device alone: (key of the layer's expert 0, rows). It
        finds those that slots hold by itself: exactly those that `load` and `poll` have told of. None where it cannot.
        """

    def join(self, ticket: Any) -> None:
        """What a run contributes may be used: by the host, once this returns, or by what is queued on the device after
        it. Raises what it met, once; more calls do nothing.
        """

    def wait(self, ticket: Any) -> None:
        """Return when a joined run has ended: for who times it."""

    def forget(self) -> None:
        """No slot holds an expert any more. There are no copies on their way."""

    def close(self) -> None:
        """End every thread and stream. Copies that have not ended are dropped."""
