"""Memory: what the system granted, sizes as text, and arrays over memory that is owned elsewhere."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class NodeMemory:
    """The weights on one memory node. id: the system's number, -1 if simulated. placed: whether the system agreed to
    its node. huge_bytes: those in huge pages.
    """

    id: int
    placed: bool
    bytes: int
    huge_bytes: int


@dataclass(frozen=True)
class MemoryGrant:
    """load: "map" or "copy"; huge_pages: the system's setting; nodes: where copied weights lie, none if mapped.

    kv_long_runs: runs of keys or values that are long enough for huge pages; kv_huge_runs: those that may have them.
    """

    load: str
    huge_pages: str
    nodes: tuple[NodeMemory, ...]
    kv_long_runs: int
    kv_huge_runs: int

    def __str__(self) -> str:
        """In a line: "weights: 1.90 GB of 2.00 GB in huge pages (system: madvise); node 0: placed, node 1: refused"."""
        parts = [self._weights(), *self._placed(), *self._keys_and_values()]
        return "; ".join(parts)

    def _weights(self) -> str:
        if self.load == "map":
            return "weights mapped from the store's files"
        huge, total = sum(node.huge_bytes for node in self.nodes), sum(node.bytes for node in self.nodes)
        return f"weights: {size_text(huge)} of {size_text(total)} in huge pages (system: {self.huge_pages})"

    def _placed(self) -> list[str]:
        real = [node for node in self.nodes if node.id >= 0]
        if not real:
            return [f"{len(self.nodes)} simulated nodes"] * (len(self.nodes) > 1)
        return [", ".join(f"node {node.id}: {'placed' if node.placed else 'refused'}" for node in real)]

    def _keys_and_values(self) -> list[str]:
        if not self.kv_long_runs:
            return []
        return [f"keys and values: huge pages for {self.kv_huge_runs} of {self.kv_long_runs} long runs"]


def size_text(size: float) -> str:
    """Bytes for people: "1.50 GB", or MB below a tenth of one."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def view(address: int, shape: tuple[int, ...], dtype: type[Any]) -> npt.NDArray[Any]:
    """Memory that somebody else owns, as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, np.dtype(dtype)).reshape(shape)
