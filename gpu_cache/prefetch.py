"""Prefetch: which experts are copied before they are called. The engine and the simulator ask after every lookup."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.outside import (
    check_answers,
    class_of_entry,
    class_of_file,
    entry_names,
    guard,
    is_file,
    make_outside,
    place_of,
)

# The router of the next layer, run early on the hidden state at hand, names the experts (Eliseev and Mazur, Fast
# inference of MoE language models with offloading, 2023). Only an engine has routers; a trace may hold what they said.
NEXT_GATE = "next-gate"
MAX_DEPTH = 64
PERFECT = "perfect"  # in a replay alone, which knows what comes


class Prefetch:
    """Interface of a rule that learns while it runs: it names experts before it has seen them called.

    A rule has `learn` and `choose`, and may then be taught by other calls first, or `follow` alone, which does both.
    depth: how many lookups ahead it looks; after the last layer comes the first one of the next step. This one names
    nothing.
    """

    name = "none"

    def __init__(self, geometry: Geometry, depth: int = 1) -> None:
        self.layers, self.experts, self.depth = geometry.layers, geometry.experts, depth

    def ahead(self, layer: int) -> int:
        """The layer whose experts are named after a lookup of this one."""
        return (layer + self.depth) % self.layers

    def follow(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        """A layer calls these experts, in no order; the experts that the layer `ahead` should have, the surest first.

        Called after every lookup of a layer, and of whatever came before nothing is told. `experts` is the table's.
        """
        self.learn(layer, experts)
        return self.choose(layer, experts)

    def learn(self, layer: int, experts: Sequence[int]) -> None:
        """A layer calls these experts."""

    def choose(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        """What `follow` answers, after whatever was learnt; changes nothing."""
        return ()


class Frequency(Prefetch):
    """Names the experts that the layer ahead called most so far, as many as this one calls."""

    name = "frequency"

    def __init__(self, geometry: Geometry, depth: int = 1) -> None:
        super().__init__(geometry, depth)
        self._calls = np.zeros((self.layers, self.experts))

    def learn(self, layer: int, experts: Sequence[int]) -> None:
        self._calls[layer, list(experts)] += 1

    def choose(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        return most(self._calls[self.ahead(layer)], len(experts))


class Transition(Prefetch):
    """Names the experts that most often followed those that this layer calls, as many as it calls.

    Of every expert it counts how often it was called and which experts were called `depth` lookups later; the shares of
    all called experts are added. Where a layer was left out in between it learns nothing.
    """

    name = "transition"

    def __init__(self, geometry: Geometry, depth: int = 1) -> None:
        super().__init__(geometry, depth)
        self._followed: dict[int, NDArray[np.float64]] = {}  # of each called key: calls of the experts ahead
        self._calls = np.zeros(self.layers * self.experts)
        self._before = deque[tuple[int, list[int]]]()  # lookups that wait: the layer ahead, and the called keys

    def learn(self, layer: int, experts: Sequence[int]) -> None:
        if len(self._before) == self.depth:
            following, before = self._before.popleft()
            if following == layer:
                self._count(before, list(experts))
        self._before.append((self.ahead(layer), self._keys(layer, experts)))

    def choose(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        found = ((key, self._followed.get(key)) for key in self._keys(layer, experts))
        shares = [row / self._calls[key] for key, row in found if row is not None]
        return most(np.sum(shares, axis=0), len(experts)) if shares else ()

    def _keys(self, layer: int, experts: Sequence[int]) -> list[int]:
        return [layer * self.experts + expert for expert in experts]

    def _count(self, keys: list[int], called: list[int]) -> None:
        self._calls[keys] += 1
        for key in keys:
            row = self._followed.get(key)
            if row is None:
                row = self._followed[key] = np.zeros(self.experts)
            row[called] += 1


class NextGate(Prefetch):
    """Names what a trace says of the next layer's router. An engine asks the router itself, and records what it says.

    Nothing is named after the last layer: the next step's first layer reads another token.
    """

    name = NEXT_GATE

    def __init__(self, geometry: Geometry, named: Iterator[tuple[int, int, list[int], list[float]]]) -> None:
        """named: of the whole replay."""
        super().__init__(geometry)
        self._named = named

    def follow(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        _, _, named, _ = next(self._named)
        return [] if layer + 1 == self.layers else [expert for expert in named if expert < self.experts]


class Perfect(Prefetch):
    """Names exactly what is called `depth` lookups later. Not a bound: where a quota or a delay binds, a copy that is
    needed later may push out what is needed sooner.
    """

    name = PERFECT

    def __init__(
        self, geometry: Geometry, calls: Iterator[tuple[int, int, list[int], list[float]]], depth: int = 1
    ) -> None:
        """calls: of the whole replay."""
        super().__init__(geometry, depth)
        self._coming = islice(calls, depth, None)

    def follow(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        _, following, coming, _ = next(self._coming, (-1, -1, [], []))
        return coming if following == self.ahead(layer) else ()


GROUP = "hybrid.prefetches"  # of entry points
LEARNT: Mapping[str, type[Prefetch]] = {rule.name: rule for rule in (Frequency, Transition)}
PREFETCHES = (Prefetch.name, NEXT_GATE, *LEARNT)  # of an engine
REPLAYED = (Prefetch.name, *LEARNT, NEXT_GATE, PERFECT)  # of a replay


def names_of_prefetches() -> tuple[str, ...]:
    """Ours that an engine has, and those that installed packages offer."""
    return (*PREFETCHES, *entry_names(GROUP))


def known_prefetch(name: str, rules: Sequence[str] = REPLAYED) -> str:
    """The name as `rules` spells it, for a name in any case; `transition:3` looks three lookups ahead. A user's rule is
    FILE.py, FILE.py:CLASS or a name that a package offers, and may have such a number behind it.

    Raises CacheError for one that is none of these.
    """
    rule, depth = _split(name, rules)
    if depth is None:
        return rule
    if rule in (Prefetch.name, NEXT_GATE) or not (depth.isdecimal() and 1 <= int(depth[:9]) <= MAX_DEPTH):
        raise CacheError(
            f"prefetch {name!r} looks ahead in no way that there is: give a learnt rule and 1 to {MAX_DEPTH} lookups, "
            f"as {Transition.name}:3"
        )
    return f"{rule}:{int(depth)}"


def depth_of(name: str) -> int:
    """How far a rule of this name, as `known_prefetch` spells it, looks ahead."""
    return rule_and_depth(name)[1]


def rule_and_depth(name: str) -> tuple[str, int]:
    """The rule of a name as `known_prefetch` spells it, and how far it looks ahead."""
    rule, colon, depth = name.rpartition(":")
    return (rule, int(depth)) if colon and depth.isdecimal() else (name, 1)


def prefetch_class(name: str) -> type[Prefetch]:
    """The class of a rule, of a name as `known_prefetch` spells it; `Prefetch` itself for one that learns nothing.
    Raises CacheError if its file or package cannot be used.
    """
    rule = rule_and_depth(name)[0]
    if rule in REPLAYED:
        return LEARNT.get(rule, Prefetch)
    return class_of_file(rule, Prefetch) if is_file(rule) else class_of_entry(rule, GROUP, Prefetch)


def learnt_rule(name: str, geometry: Geometry) -> Prefetch | None:
    """The rule of a name as `known_prefetch` spells it; None for one that learns nothing. Raises CacheError for a
    user's rule that cannot be used; what it does wrong later is a CacheError, too.
    """
    kind, depth = prefetch_class(name), depth_of(name)
    if kind is Prefetch:
        return None
    return kind(geometry, depth) if kind in LEARNT.values() else guarded_prefetch(kind, geometry, depth)


def guarded_prefetch(kind: type[Prefetch], geometry: Geometry, depth: int = 1) -> Prefetch:
    """A rule whose errors and wrong answers are a CacheError with file, line and rule."""
    if kind.follow is Prefetch.follow and kind.choose is Prefetch.choose:
        raise CacheError(
            f"{place_of(kind)}: {kind.__name__} has no choose and no follow; a rule says which experts are copied early"
        )
    if kind.ahead is not Prefetch.ahead:
        raise CacheError(
            f"{place_of(kind.ahead)}: {kind.__name__} has an ahead of its own; which layer a rule names experts of is "
            "what its depth says"
        )
    rule = make_outside(kind, "a rule is made from a geometry and a depth", geometry=geometry, depth=depth)
    if [getattr(rule, name, None) for name in ("layers", "experts", "depth")] != [*_shape(geometry), depth]:
        raise CacheError(
            f"{place_of(kind)}: {kind.__name__} has no depth, or another one; "
            "its __init__ calls super().__init__(geometry, depth), and what that sets stays"
        )
    guard(rule, ["learn", "choose", "follow"])
    for name in ("choose", "follow"):
        check_answers(rule, name, partial(_experts_of, geometry.experts))
    return rule


def can_be_taught(rule: Prefetch) -> bool:
    """Whether a rule, made by `learnt_rule`, learns apart from choosing."""
    return type(rule).follow is Prefetch.follow


def _shape(geometry: Geometry) -> tuple[int, int]:
    return geometry.layers, geometry.experts


def _experts_of(experts: int, answer: Iterable[Any]) -> list[int]:
    """What a rule names, as a list. Raises TypeError and ValueError that say what it should be."""
    try:
        named = [index(expert) for expert in answer]
    except TypeError:
        raise TypeError("it is a list of the numbers of experts, the surest first, and an empty one for none") from None
    if wrong := next((expert for expert in named if not 0 <= expert < experts), None):
        raise ValueError(f"a layer has experts 0 to {experts - 1}, not {wrong}")
    return named


def is_file_of_prefetch(name: str) -> bool:
    """Whether a name means a file, and not a rule with how far it looks ahead."""
    rule = name.partition(":")[0].lower()
    return is_file(name) and rule not in (*REPLAYED, *map(str.lower, entry_names(GROUP)))


def _split(name: str, rules: Sequence[str]) -> tuple[str, str | None]:
    """The rule as it is spelt, and what is behind its last colon if that says how far it looks ahead."""
    rule, colon, depth = name.partition(":")
    if rule.lower() in rules:
        return rule.lower(), depth if colon else None
    if offered := next((known for known in entry_names(GROUP) if known.lower() == rule.lower()), None):
        return offered, depth if colon else None
    if is_file(name):
        rule, colon, depth = name.rpartition(":")
        rule, number = (rule, depth) if colon and depth.isdecimal() else (name, None)
        class_of_file(rule, Prefetch)
        return rule, number
    raise CacheError(f"prefetch {name!r} is unknown: use one of {', '.join(rules)}, or FILE.py:CLASS")


def most(values: NDArray[np.float64], count: int) -> list[int]:
    """The numbers of the largest values above 0, `count` at most; of equal ones the lowest first."""
    order = np.argsort(-values, kind="stable")[:count]
    return [int(number) for number in order if values[number] > 0]
