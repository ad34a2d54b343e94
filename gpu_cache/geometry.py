"""Where an expert may lie: N indexes of M ways, and the mapping of experts to indexes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError

MAPPINGS = ("modulo", "prefix", "hash")
NOWHERE = -1  # the index of an expert that is never cached
_SHARED_WAYS = 8  # `auto_geometry` lets layers share an index before it makes indexes smaller than this
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Geometry:
    """N = `nblocks` indexes of M = `nways` slots for the experts of a model: `layers` MoE layers of `experts` each.

    An expert is a key, layer * experts + expert; slot = index * nways + way. mapping:
    modulo   index = layer mod N; with more indexes than layers, each layer has N // layers of them, by expert mod that;
    prefix   index = layer, layers from N on are not cached;
    hash     index = a hash of the key mod N.
    Raises CacheError for sizes that no cache of this model can have.
    """

    nblocks: int
    nways: int
    layers: int
    experts: int
    mapping: str = "modulo"

    def __post_init__(self) -> None:
        if self.mapping not in MAPPINGS:
            raise CacheError(f"mapping {self.mapping!r} is unknown: use one of {', '.join(MAPPINGS)}")
        _within("layers", self.layers, None)
        _within("experts", self.experts, None)
        maximum = self.layers * self.experts
        _within("indexes (nblocks)", self.nblocks, self.layers if self.mapping == "prefix" else maximum)
        _within("ways (nways)", self.nways, maximum)
        if self.slots > maximum:
            raise CacheError(
                f"{self.nblocks} indexes x {self.nways} ways are {self.slots} slots, the model has {maximum} experts "
                f"({self.layers} layers x {self.experts}): at most {max(1, maximum // self.nways)} indexes of "
                f"{self.nways} ways, or {max(1, maximum // self.nblocks)} ways in {self.nblocks} indexes"
            )

    @property
    def slots(self) -> int:
        return self.nblocks * self.nways

    def index_of(self, key: int) -> int:
        """The index whose slots may hold an expert; -1 if none may."""
        layer, expert = divmod(key, self.experts)
        if self.mapping == "hash":
            return _mixed(key) % self.nblocks
        if self.mapping == "prefix":
            return layer if layer < self.nblocks else NOWHERE
        spread = self.nblocks // self.layers
        return layer + self.layers * (expert % spread) if spread > 1 else layer % self.nblocks

    def indexes(self) -> NDArray[np.int64]:
        """[layers * experts]: `index_of` every key."""
        keys = range(self.layers * self.experts)
        return np.fromiter(map(self.index_of, keys), np.int64, len(keys))

    def spread(self) -> NDArray[np.int64]:
        """[nblocks, layers]: how many experts of a layer belong to an index."""
        index = self.indexes()
        layer = np.arange(len(index)) // self.experts
        cached = index != NOWHERE
        counts = np.bincount(index[cached] * self.layers + layer[cached], minlength=self.nblocks * self.layers)
        return counts.reshape(self.nblocks, self.layers)


def auto_geometry(slots_that_fit: int, layers: int, experts: int, nways: int | None = None) -> Geometry:
    """The largest cache of at most `slots_that_fit` slots, with one index per layer if that leaves enough ways.

    Raises CacheError when not even one index fits.
    """
    slots = min(slots_that_fit, layers * experts)
    if slots < (nways or 1):
        raise CacheError(f"{nways or 1} slots are wanted for one index, {max(0, slots_that_fit)} fit the device")
    if nways is None:
        nblocks = min(layers, max(1, slots // _SHARED_WAYS))
        return Geometry(nblocks, slots // nblocks, layers, experts)
    nblocks = slots // nways
    return Geometry(nblocks - nblocks % layers if nblocks > layers else nblocks, nways, layers, experts)


def _within(name: str, value: int, maximum: int | None) -> None:
    if value < 1 or (maximum is not None and value > maximum):
        raise CacheError(
            f"{name} of the cache: {value}, must be {'at least 1' if maximum is None else f'1 to {maximum}'}"
        )


def _mixed(key: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): every bit of the key changes about half of the result."""
    x = (key + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
