"""Copies of experts to the slots of a device, from their start until the table knows of them."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_cache.device import Device
from gpu_cache.table import Table


class Copies:
    """The copies in flight."""

    def __init__(self) -> None:
        self._keys: dict[int, int] = {}  # of the expert that each slot gets
        self._late: set[int] = set()  # keys that were called for while they were copied

    def start(self, device: Device, slot: int, key: int) -> None:
        self._keys[slot] = key
        device.copy_in(slot, key)

    def publish(self, device: Device, table: Table) -> None:
        """Tell the table of the copies that have ended: whole experts are resident from now on."""
        for slot, whole in device.poll():
            self._late.discard(self._keys.pop(slot))
            if whole:
                table.publish(slot)
            else:
                table.abandon(slot)

    def count_late(self, keys: Iterable[int]) -> int:
        """How many of these experts, all of them in flight, are called for the first time since their copy began."""
        new = set(keys) - self._late
        self._late |= new
        return len(new)

    def clear(self) -> None:
        """Forget them: the device has no copies in flight."""
        self._keys.clear()
        self._late.clear()
