"""Golden numbers of every policy on the traces in tests/traces/: those of the table in docs/cache_results.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_cache.policies import POLICIES
from gpu_cache.simulator import Setting, replay
from gpu_cache.trace import Calls, calls
from hybrid.files.traces import read_trace

ROOT = Path(__file__).parent.parent.parent
NAMES = ("stories", "chat", "code")
HITS = {  # 16 indexes of 4 ways, every miss copied
    "2Q": (2130, 2356, 2356),
    "ARC": (2090, 2388, 2388),
    "ClassLRU": (2142, 2423, 2501),
    "CLOCK": (2084, 2399, 2351),
    "FIFO": (2092, 2340, 2258),
    "hot-half": (2232, 2461, 2510),
    "least-stale": (2093, 2367, 2324),
    "LeCaR": (2076, 2379, 2352),
    "LFRU": (2093, 2427, 2457),
    "LFU": (2256, 2490, 2556),
    "LRU": (2093, 2367, 2324),
    "LRU-2": (2066, 2417, 2468),
    "MRS": (2078, 2397, 2481),
    "random": (2061, 2352, 2357),
    "S3-FIFO": (2191, 2382, 2482),
    "SIEVE": (2125, 2409, 2435),
    "SLRU": (2189, 2361, 2418),
    "Belady": (3137, 3358, 3409),
    "bypass-Belady": (3468, 3688, 3752),
    "static-best": (2356, 2546, 2826),
    "static-layers": (1676, 1720, 1665),
}


@pytest.fixture(scope="module")
def traces() -> list[Calls]:
    return [calls(read_trace(ROOT / "tests" / "traces" / f"{name}.csv")) for name in NAMES]


@pytest.mark.parametrize("policy", HITS)
def test_hits_on_the_committed_traces(traces, policy) -> None:
    assert tuple(int(replay(trace, Setting(16, 4, policy)).hits.sum()) for trace in traces) == HITS[policy]


def test_every_policy_has_a_row() -> None:
    assert set(POLICIES) <= set(HITS)


def test_the_table_of_the_docs_has_these_numbers(traces) -> None:
    text = (ROOT / "docs" / "cache_results.md").read_text()
    for policy, hits in HITS.items():
        rates = [f"{hit / trace.total:.1%}" for hit, trace in zip(hits, traces, strict=True)]
        assert f"| `{policy}` | {' | '.join(rates)} |" in text
