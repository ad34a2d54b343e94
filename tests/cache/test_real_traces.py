"""Routes of real models: what their authors published, and the numbers of docs/cache_results.md."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from gpu_cache.intervals import blocks_of  # noqa: E402
from gpu_cache.simulator import Setting, replay  # noqa: E402
from gpu_cache.trace import Calls, calls  # noqa: E402
from hybrid.files.traces import read_trace  # noqa: E402

FOLDER = Path(__file__).parent.parent / "traces" / "real"
SHAPES = {  # layers, experts, steps, calls, blocks
    "gpt-oss-20b": (24, 32, 16970, 1629120, 44),
    "qwen3-30b-a3b": (48, 128, 129, 39526, 24),
    "gpt-oss-120b": (36, 128, 65, 6375, 24),
}


@pytest.fixture(scope="module", params=SHAPES)
def named(request) -> tuple[str, Calls]:
    return request.param, calls(read_trace(FOLDER / f"{request.param}.parquet"))


def test_a_trace_is_whole(named) -> None:
    name, trace = named
    assert (trace.layers, trace.experts, trace.steps, trace.total, int(blocks_of(trace)[-1]) + 1) == SHAPES[name]


PUBLISHED = {  # by slots of one index: hits in % of Belady's rule and of LRU, as BigMoeOnEdge printed them
    59: (26.902, 0.0),
    118: (38.431, 13.004),
    198: (46.604, 30.133),
    317: (52.769, 37.380),
    634: (61.459, 47.624),
}


@pytest.mark.parametrize("slots", PUBLISHED)
def test_hits_are_those_that_were_published(slots: int) -> None:
    """LRU differs by up to 3 of 6,375: theirs orders the experts of a prompt by last appearance, ours by first."""
    trace = calls(read_trace(FOLDER / "gpt-oss-120b.parquet"))
    belady, lru = (100 * replay(trace, Setting(1, slots, policy)).hit_rate for policy in ("Belady", "LRU"))
    assert round(belady, 3) == PUBLISHED[slots][0] and lru == pytest.approx(PUBLISHED[slots][1], abs=0.05)


@pytest.mark.parametrize(
    ("name", "hits"),
    [
        ("qwen3-30b-a3b", {"LRU": 30217, "LFU": 30868, "SIEVE": 30634, "bypass-Belady": 33942}),
        ("gpt-oss-120b", {"LRU": 3584, "LFU": 3584, "S3-FIFO": 3377, "bypass-Belady": 4081}),
    ],
)
def test_hits_of_an_index_of_32_ways_a_layer(name: str, hits: dict[str, int]) -> None:
    trace = calls(read_trace(FOLDER / f"{name}.parquet"))
    assert {policy: int(replay(trace, Setting(trace.layers, 32, policy)).hits.sum()) for policy in hits} == hits
