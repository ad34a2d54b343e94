"""Weights copied out of a store into anonymous memory: huge pages, and each node's part on its node."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import cpu_kernels
from hybrid.errors import CapacityError
from hybrid.formats.block import LINE, Bytes, round_up
from hybrid.models.tensors import StoreTensor
from hybrid.weights.split import Parts, part_bytes, write_part
from hybrid.weights.store import Store

Places = dict[tuple[str, int], tuple[int, int]]  # (tensor, node): (offset in the memory of that node, bytes)


class CopiedWeights:
    """Tensors of a store in an arena for each node. What is not split is whole on the first node."""

    def __init__(
        self,
        store: Store,
        tensors: Iterable[StoreTensor],
        parts: Parts,
        node_ids: tuple[int, ...],
        threads: int,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Copy tensors of a store with `threads` threads; it may be closed afterwards.

        node_ids: the system's numbers of the nodes, -1 for none. progress: called with (what, done, total).
        Raises CapacityError.
        """
        self._places, sizes = lay_out(tensors, parts, len(node_ids))
        try:
            self.arenas = [cpu_kernels.Arena(size, True, id) for size, id in zip(sizes, node_ids, strict=True)]
        except MemoryError:
            raise CapacityError(f"{sum(sizes) / 1e9:.2f} GB for a copy of the weights cannot be allocated") from None
        self._fill(store, parts, threads, progress or (lambda *_: None))

    def address(self, name: str, node: int = -1) -> int:
        """Where the part of a node, or a whole tensor (-1), starts; a multiple of 64."""
        return int(self.arenas[max(node, 0)].address) + self._places[name, node][0]

    def _fill(self, store: Store, parts: Parts, threads: int, progress: Callable[[str, int, int], None]) -> None:
        def copy(place: tuple[str, int]) -> None:
            name, node = place
            if store.unverified and node <= 0:
                store.verify(name)
            tensor, array = store.tensors[name], store.array(name)
            if node < 0:
                self._memory(name, node)[...] = array.reshape(-1).view(np.uint8)
            else:
                write_part(tensor, array, parts[name][node], self._memory(name, node))

        with ThreadPoolExecutor(threads) as pool:
            for done, _ in enumerate(pool.map(copy, self._places), start=1):
                progress("loading", done, len(self._places))

    def _memory(self, name: str, node: int) -> Bytes:
        size = self._places[name, node][1]
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address(name, node)))


def lay_out(tensors: Iterable[StoreTensor], parts: Parts, nodes: int) -> tuple[Places, tuple[int, ...]]:
    """Where everything lies, and the bytes that each node holds."""
    places: Places = {}
    ends = [0] * nodes
    for tensor in tensors:
        pieces = [(node, part_bytes(tensor, blocks)) for node, blocks in enumerate(parts.get(tensor.name, ()))]
        for node, size in pieces or [(-1, tensor.nbytes)]:
            places[tensor.name, node] = ends[max(node, 0)], size
            ends[max(node, 0)] += round_up(size, LINE)
    return places, tuple(ends)
