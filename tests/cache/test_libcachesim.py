"""Fully associative, with one call a step, our policies are those of libCacheSim, call by call."""

from __future__ import annotations

from random import Random

import pytest

from gpu_cache.geometry import Geometry
from gpu_cache.table import Table

lcs = pytest.importorskip("libcachesim", reason="libcachesim cannot be had here: `pip install libcachesim`")

THEIRS = {
    "LRU": lcs.LRU,
    "FIFO": lcs.FIFO,
    "SIEVE": lcs.Sieve,
    "S3-FIFO": lcs.S3FIFO,
    "CLOCK": lcs.Clock,
    "SLRU": lcs.SLRU,
    "2Q": lcs.TwoQ,
    "ARC": lcs.ARC,
}
# With fewer ways their small queues have no room, and they refuse every call; of other numbers than multiples of four
# their segments leave some unused.
FEWEST = {"S3-FIFO": 20, "2Q": 4}
CASES = [
    (name, ways)
    for name in THEIRS
    for ways in ((4, 20, 100) if name == "SLRU" else (1, 2, 7, 20, 33, 100))
    if ways >= FEWEST.get(name, 1)
]
CALLS = 8000


def our_hits(policy: str, ways: int, keys: list[int]) -> list[bool]:
    table, hits = Table(Geometry(1, ways, 1, max(keys) + 1 + ways), policy), []
    for step, key in enumerate(keys):
        table.begin_step(step)
        hits.append(bool(table.lookup(0, [key]).hits))
        table.release()
        for fill in table.admit():
            table.publish(fill.slot)
    return hits


def their_hits(policy: str, ways: int, keys: list[int]) -> list[bool]:
    cache, request, hits = THEIRS[policy](cache_size=ways), lcs.Request(), []
    request.obj_size = 1
    for key in keys:
        request.obj_id = key
        hits.append(cache.get(request))
    return hits


def skewed(ways: int) -> list[int]:
    """Most calls go to few experts, some to any."""
    random, experts = Random(ways), 3 * ways + 5
    often = [min(int(random.paretovariate(0.8) * 3), experts) - 1 for _ in range(CALLS)]
    return [key if random.random() < 0.8 else random.randrange(experts) for key in often]


def layered(ways: int) -> list[int]:
    """As a model calls: layer after layer, some experts of the step before again."""
    random, layers, experts = Random(ways), 5, max(4, ways // 2)
    last = [[random.randrange(experts) for _ in range(3)] for _ in range(layers)]
    keys = []
    while len(keys) < CALLS:
        for layer in range(layers):
            last[layer] = [e if random.random() < 0.6 else random.randrange(experts) for e in last[layer]]
            keys += [layer * experts + expert for expert in dict.fromkeys(last[layer])]
    return keys


@pytest.mark.parametrize("trace", [skewed, layered])
@pytest.mark.parametrize(("policy", "ways"), CASES)
def test_hits_are_the_same(policy: str, ways: int, trace: object) -> None:
    keys = trace(ways)  # type: ignore[operator]
    ours = our_hits(policy, ways, keys)
    assert ours == their_hits(policy, ways, keys)
    assert (any(ours) or ways < 7) and not all(ours)
