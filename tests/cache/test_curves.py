"""Curves from one pass are those of the simulator, at every number of ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from routing import random_trace

from gpu_cache.curves import CURVES, curve
from gpu_cache.errors import CacheError
from gpu_cache.simulator import Setting, replay
from gpu_cache.trace import Calls, calls

TRACES = {  # a token a step; prompts whose lookups are larger than small indexes; one call a lookup
    "decode": random_trace(1, steps=50, layers=3, experts=8, top_k=3),
    "prompts": random_trace(2, steps=20, layers=3, experts=8, top_k=3, tokens=4),
    "single": random_trace(3, steps=60, layers=3, experts=8, top_k=1),
}
PLACES = [(1, "modulo"), (2, "modulo"), (3, "modulo"), (6, "modulo"), (2, "prefix"), (5, "hash")]


@pytest.mark.parametrize("policy", CURVES)
@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize(("nblocks", "mapping"), PLACES)
def test_a_curve_is_what_the_simulator_hits_with_every_number_of_ways(policy, name, nblocks, mapping) -> None:
    trace = calls(TRACES[name])
    found = curve(trace, policy, nblocks, mapping)
    sizes = range(1, 24 // nblocks + 1)
    assert found.hits.tolist() == [
        0,
        *(int(replay(trace, Setting(nblocks, ways, policy, mapping=mapping)).hits.sum()) for ways in sizes),
    ]
    assert found.calls == trace.total


def test_what_hit_is_older_than_what_missed_in_the_same_lookup() -> None:
    """With 2 ways the lookup of 0 and 2 hits 2 and misses 0, so that 0 is the newer, and stays when 3 comes: one hit
    more than by the order of the calls.
    """
    groups = [(2,), (0, 2), (3,), (0,)]
    start, expert = np.cumsum([0, *map(len, groups)]), np.array([key for group in groups for key in group])
    step = np.arange(len(groups))
    none, scores = np.zeros_like(step), np.ones(len(expert), np.float32)
    assert curve(Calls(step, none, none, start, expert, scores, 1, 5), "LRU", 1).hits.tolist() == [0, 1, 2, 2, 2, 2]


def test_a_policy_without_a_curve_is_refused() -> None:
    with pytest.raises(CacheError, match="SIEVE has no curve from one pass; those that have one: LRU, Belady"):
        curve(calls(TRACES["single"]), "SIEVE", 1)


REAL = Path(__file__).parent.parent / "traces" / "real"


@pytest.mark.parametrize("policy", ["LRU", "bypass-Belady"])
def test_curves_of_a_real_prompt_and_its_answer(policy: str) -> None:
    pytest.importorskip("pyarrow")
    from hybrid.files.traces import read_trace

    trace = calls(read_trace(REAL / "gpt-oss-120b.parquet"))
    found = curve(trace, policy, trace.layers).hits
    for ways in (2, 31, 32, 64):
        assert found[ways] == replay(trace, Setting(trace.layers, ways, policy)).hits.sum()
