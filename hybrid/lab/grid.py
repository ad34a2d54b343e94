"""The replays that the caches of an experiment stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product

from gpu_cache.errors import CacheError
from gpu_cache.simulator import SCHEDULES, Setting
from gpu_cache.trace import Calls
from hybrid.lab.parts import LAYERS, Caches

BOUND, FIXED = "bypass-Belady", "static-best"  # replayed beside all others
BESIDE = (BOUND, FIXED)


def combinations(caches: Caches, calls: Calls) -> Iterator[Setting]:
    """What is replayed of a model with these calls. Raises CacheError for shares that are none."""
    shapes = [(n, ways_of(ways, n, calls)) for n in indexes_of(caches.nblocks, calls) for ways in caches.nways]
    quotas = [None if quota == "none" else int(quota) for quota in caches.quota]
    for (n, m), mapping, quota, delay in product(shapes, caches.mapping, quotas, caches.copy_delay):
        place = Setting(n, m, mapping=mapping, quota=quota, delay=delay)
        for policy, admission, ahead, seed in product(
            caches.policies, caches.admissions, caches.prefetch, caches.seeds
        ):
            if policy in SCHEDULES:  # knows the future: asks no rule, copies nothing ahead, draws no lots
                yield replace(place, policy=policy)
            else:
                yield replace(place, policy=policy, admission=admission, prefetch=ahead, seed=seed)
        yield from (replace(place, policy=policy) for policy in BESIDE)


def indexes_of(counts: Iterable[int | str], calls: Calls) -> list[int]:
    return [calls.layers if count == LAYERS else int(count) for count in counts]


def ways_of(ways: int | float, nblocks: int, calls: Calls) -> int:
    """Of each index, of a number of slots or of a share of all experts. Raises CacheError."""
    if isinstance(ways, int):
        return ways
    if not 0 < ways <= 1:
        raise CacheError(f"nways has the share {ways}; it must be above 0, at most 1.0, or a whole number")
    return max(1, int(Fraction(str(ways)) * calls.layers * calls.experts / max(1, nblocks)))  # exact: 0.15 of 60 is 9
