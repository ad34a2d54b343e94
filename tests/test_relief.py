"""Kept prompts give their memory back: where the system runs short of it, and after a while without requests."""

from __future__ import annotations

import gc
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from dummy_engine import WATCHDOG, DummyEngine
from test_kept import request, run

from hybrid import LLM, EngineConfig
from hybrid.engine.engine import Engine
from hybrid.machine.hardware import Memory
from hybrid.serving import loop, relief
from hybrid.serving.scheduler import Scheduler


@pytest.fixture
def free(monkeypatch):
    """What the system says is free, at every look."""
    bytes_free = [1000]
    monkeypatch.setattr(relief, "memory", lambda: Memory(1000, bytes_free[0]))
    monkeypatch.setattr(relief, "CHECK_SECONDS", 0.0)
    return bytes_free


def test_where_memory_is_short_sequences_give_way_first_and_the_oldest_first(free) -> None:
    engine = DummyEngine(kv_token_budget=512, prefix_bytes=512, max_seq_len=400, max_rows=64, min_free_bytes=500)
    scheduler = Scheduler(engine)
    pool = scheduler._admission.pool
    run(scheduler, *(request([token] * 32, 1) for token in (1, 2, 3)))
    assert (scheduler.kept_lengths, pool.nbytes) == ([32] * 3, 96)
    free[0] = 500
    scheduler.rest()
    assert (scheduler.kept_lengths, pool.nbytes) == ([32] * 3, 96)
    free[0] = 460
    scheduler.rest()
    assert (scheduler.kept_lengths, pool.nbytes) == ([32], 96)
    free[0] = 450
    scheduler.rest()
    assert (scheduler.kept_lengths, pool.nbytes) == ([], 64)
    assert pool.find(np.array([1] * 32, np.int32)) is None and pool.find(np.array([2] * 32, np.int32)) is not None
    free[0] = 0
    (entry,) = run(scheduler, request([2] * 32, 1))  # steps look, too
    assert entry.completion.cached_tokens == 0 and entry.error is None
    scheduler.rest()
    assert not scheduler.holds_any


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_idle_memory_goes_back_to_the_system_and_comes_again() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 1900).tolist()
    with Engine.open(EngineConfig(threads=1, kv_idle_release=60.0, speculate=False)) as engine:
        scheduler = Scheduler(engine)
        answers, sizes = [], []
        for _ in range(2):
            (entry,) = run(scheduler, request(tokens, 4, ignore_eos=True, logprobs=5))
            answers.append((entry.completion.token_ids, entry.completion.logprobs, entry.completion.cached_tokens))
            scheduler.rest()
            assert scheduler.holds_any
            scheduler._relief._busy -= 61
            full = resident()
            scheduler.rest()
            sizes.append(full - resident())
            assert not scheduler.holds_any
    held = 2 * len(tokens) * engine.plan.kv.token_bytes  # in the sequence and in the pool
    assert min(sizes) > 0.9 * held and answers[0] == answers[1]


def test_the_loop_looks_while_there_are_no_requests(monkeypatch) -> None:
    monkeypatch.setattr(loop, "CHECK_SECONDS", 0.01)
    with LLM(kv_idle_release=0.0) as llm:
        llm.chat([{"role": "user", "content": "A story of a king and a horse."}], keep=True)
        end = monotonic() + WATCHDOG
        while llm.loop.kept_lengths() or llm.loop.prefix_report().bytes:
            assert monotonic() < end
            sleep(0.01)
