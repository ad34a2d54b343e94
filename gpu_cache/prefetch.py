"""Prefetch: which experts are copied before they are called. The engine and the simulator ask after every lookup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry

# The router of the next layer, run early on the hidden state at hand, names the experts (Eliseev and Mazur, Fast
# inference of MoE language models with offloading, 2023). Only an engine has routers.
NEXT_GATE = "next-gate"
PERFECT = "perfect"  # in a replay alone, which knows what comes


class Prefetch:
    """Interface of a rule that learns while it runs: it names experts before it has seen them called.

    This one names nothing.
    """

    name = "none"

    def __init__(self, geometry: Geometry) -> None:
        self.layers, self.experts = geometry.layers, geometry.experts

    def follow(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        """A layer calls these experts; the experts that the next one should have, the surest first. Of the last layer
        none are asked for.
        """
        return ()


class Frequency(Prefetch):
    """Names the experts that the next layer called most so far, as many as this one calls."""

    name = "frequency"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._calls = np.zeros((self.layers, self.experts))

    def follow(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        self._calls[layer, list(experts)] += 1
        return most(self._calls[layer + 1], len(experts)) if layer + 1 < self.layers else ()


class Transition(Prefetch):
    """Names the experts that most often followed those that this layer calls, as many as it calls.

    Of every expert it counts how often it was called and which experts the next layer called in the same step; the
    shares of all called experts are added. A layer that is looked up out of order is learnt nothing from.
    """

    name = "transition"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._followed: dict[
            int, NDArray[np.float64]
        ] = {}  # of each called key: calls of each expert of the next layer
        self._calls = np.zeros(self.layers * self.experts)
        self._before: tuple[int, list[int]] = (-1, [])  # the lookup before: the next layer, and its keys

    def follow(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        following, keys = self._before
        called = list(experts)
        if following == layer:
            self._calls[keys] += 1
            for key in keys:
                row = self._followed.get(key)
                if row is None:
                    row = self._followed[key] = np.zeros(self.experts)
                row[called] += 1
        if layer + 1 == self.layers:
            self._before = (-1, [])
            return ()
        keys = [layer * self.experts + expert for expert in called]
        self._before = (layer + 1, keys)
        shares = [row / self._calls[key] for key in keys if (row := self._followed.get(key)) is not None]
        return most(np.sum(shares, axis=0), len(called)) if shares else ()


class Perfect(Prefetch):
    """Names exactly what the next layer calls in the same step: what no prediction can beat, with the same table."""

    name = PERFECT

    def __init__(self, geometry: Geometry, calls: Iterator[tuple[int, int, list[int], list[float]]]) -> None:
        """calls: of the whole replay."""
        super().__init__(geometry)
        self._coming = calls
        self._step = next(self._coming, (0, 0, [], []))[0]

    def follow(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        before, (self._step, following, coming, _) = self._step, next(self._coming, (-1, -1, [], []))
        return coming if before == self._step and following == layer + 1 else ()


LEARNT: Mapping[str, type[Prefetch]] = {rule.name: rule for rule in (Frequency, Transition)}
PREFETCHES = (Prefetch.name, NEXT_GATE, *LEARNT)  # of an engine
REPLAYED = (Prefetch.name, *LEARNT, PERFECT)  # of a replay


def known_prefetch(name: str) -> str:
    """The name as `REPLAYED` spells it, for a name in any case. Raises CacheError for one that no replay can have."""
    if name.lower() in REPLAYED:
        return name.lower()
    if name.lower() == NEXT_GATE:
        raise CacheError(
            f"prefetch {NEXT_GATE} cannot be replayed: a trace does not hold what a router says one layer early; "
            f"use {', '.join(REPLAYED)}"
        )
    raise CacheError(f"prefetch {name!r} is unknown: use one of {', '.join(REPLAYED)}")


def most(values: NDArray[np.float64], count: int) -> list[int]:
    """The numbers of the largest values above 0, `count` at most; of equal ones the lowest first."""
    order = np.argsort(-values, kind="stable")[:count]
    return [int(number) for number in order if values[number] > 0]
