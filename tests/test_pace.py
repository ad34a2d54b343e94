"""Texts keep their pace while prompts are read: chunks follow from what steps took, by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from dummy_engine import DummyEngine, reference_tokens
from test_kept import request, run

from hybrid.config import EngineConfig
from hybrid.core import Batch, StepResult
from hybrid.serving.pace import SHARE, STRETCH, Pace
from hybrid.serving.scheduler import Scheduler
from hybrid.serving.step_seconds import StepSeconds

pytestmark = pytest.mark.by_clock
PLAN = {"max_seq_len": 1200, "kv_token_budget": 6000, "max_rows": 256, "sequences": 5, "speculate": False}


@pytest.fixture(autouse=True)
def no_other_clock(monkeypatch) -> None:
    monkeypatch.setattr("hybrid.serving.scheduler.perf_counter", lambda: 0.0)


class Timed(DummyEngine):
    """Steps take as long as `seconds` of their batch says; `took` has that with how many tokens were produced."""

    def __init__(self, seconds: Callable[[Batch], float], **plan) -> None:
        super().__init__(**{**PLAN, **plan})
        self._seconds = seconds
        self.took: list[tuple[int, int, float]] = []  # rows of streams, of the prompt, seconds

    def step_bytes(self, rows: int) -> float:
        return 100.0 + rows

    def forward(self, batch: Batch) -> StepResult:
        result, seconds = super().forward(batch), self._seconds(batch)
        prompt = int((batch.sequences == 4).sum())
        self.took.append((len(batch.token_ids) - prompt, prompt, seconds))
        return replace(result, times=replace(result.times, total=seconds))


def read_beside_streams(engine: Timed) -> list[tuple[int, int, float]]:
    """The steps in which a prompt of 1,000 tokens is read while four streams go on."""
    scheduler = Scheduler(engine)
    running = [request([token], 1100, keep=False) for token in range(4)]
    scheduler.add(*running)
    for _ in range(10):
        scheduler.step()
    engine.took.clear()
    prompt = [7] * 1000
    scheduler.add(entry := request(prompt, 3, keep=False))
    while not entry.finished:
        scheduler.step()
    assert entry.completion.token_ids == reference_tokens(prompt, 3)
    for other in running:
        produced = other.completion.token_ids
        assert produced == reference_tokens(other.prompt.tolist(), len(produced)) and len(produced) >= len(engine.took)
    return [step for step in engine.took if step[1] > 1]


def linear(batch: Batch) -> float:
    return 1 + 0.01 * len(batch.token_ids)


def test_a_limit_is_kept_while_a_prompt_is_read() -> None:
    steps = read_beside_streams(Timed(linear, max_itl=1.5))
    assert all(seconds <= 1.5 for _, _, seconds in steps)
    assert max(rows for _, rows, _ in steps) >= 24  # and what it allows is used


def test_without_a_limit_streams_slow_down_a_little_and_prompts_keep_a_share() -> None:
    steps = read_beside_streams(Timed(linear, max_itl=None))
    assert max(seconds for _, _, seconds in steps[1:]) <= max(STRETCH * 1.04, 1.04 + 0.01 * 64)
    dear = read_beside_streams(Timed(lambda batch: 0.1 * len(batch.token_ids), max_itl=None))
    alone = 256 / (0.1 * 260)
    assert all(rows / seconds >= 0.9 * SHARE * alone for _, rows, seconds in dear[3:-1])


def test_zero_is_no_limit_and_nobody_is_waited_for_where_no_text_is_produced() -> None:
    assert read_beside_streams(Timed(linear, max_itl=0.0))[0][1] == 252
    engine = Timed(linear, max_itl=1.01)
    run(Scheduler(engine), request([7] * 1000, 2))
    assert [len(batch.token_ids) for batch in engine.steps] == [256, 256, 256, 232, 1]


def test_a_limit_that_cannot_be_kept_leaves_a_row_to_the_prompt() -> None:
    scheduler = Scheduler(engine := Timed(linear, max_itl=0.001))
    scheduler.add(request([1], 40, keep=False))
    scheduler.step()
    run(scheduler, entry := request([7] * 20, 2))
    assert entry.completion.token_ids == reference_tokens([7] * 20, 2)
    assert [len(batch.token_ids) for batch in engine.steps[1:21]] == [2] * 20


def test_chunks_shrink_where_longer_sequences_make_steps_slower() -> None:
    def seconds(batch: Batch) -> float:
        return linear(batch) + 3e-5 * int(batch.positions[4:].sum())

    steps = read_beside_streams(Timed(seconds, max_itl=2.0))
    assert steps[0][1] > 2 * steps[-2][1] >= 2
    assert sum(took > 2.0 for *_, took in steps) <= 3 and all(took < 2.2 for *_, took in steps)


def by_pairs(batch: Batch) -> float:
    return linear(batch) + 3e-5 * int(batch.positions.sum())


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_prompt_that_goes_on_behind_many_tokens_gets_a_chunk_for_its_length(noise: float) -> None:
    """As a question in a long conversation does, whose keys and values are there: no step has told of that yet."""
    random = np.random.default_rng(4)
    engine = Timed(lambda batch: by_pairs(batch) * (1 + noise * random.uniform(-1, 1)), max_itl=2.0, sequences=6)
    scheduler = Scheduler(engine)
    run(scheduler, long := request([7] * 1000, 2))
    scheduler.add(*(request([token], 1100, keep=False) for token in range(4)))
    for _ in range(10):
        scheduler.step()
    scheduler.add(short := request([8] * 200, 1, keep=False))
    while not short.finished:
        scheduler.step()
    engine.took.clear()
    scheduler.add(entry := request([*long.known.tolist(), *[9] * 150], 1))
    while not entry.finished:
        scheduler.step()
    assert entry.completion.cached_tokens >= 992
    assert all(seconds <= 2.0 * (1 + 2 * noise) for *_, seconds in engine.took)
    assert max(len(batch.token_ids) for batch in engine.steps[-len(engine.took) :]) >= 16, "what is allowed is used"


def test_noise_is_not_taken_for_the_cost_of_length() -> None:
    random, seconds = np.random.default_rng(1), StepSeconds(lambda rows: 100.0 + rows)
    for step in range(2000):
        seconds.tell(4, random.uniform(0.8, 1.2), 4.0 * (100 + step % 50))
    assert 0.7 < seconds.expected(4, 4.0 * 30_000) < 2.5


def test_the_cost_of_length_is_told_by_steps_of_any_size() -> None:
    random, seconds = np.random.default_rng(2), StepSeconds(lambda rows: 100.0 + rows)

    def truly(rows: int, pairs: float) -> float:
        return 0.01 * (100 + rows) + 1e-5 * pairs

    for step in range(60):
        rows, depth = (5, 64)[step % 2], 40 * step
        seconds.tell(rows, truly(rows, rows * depth) * random.uniform(0.95, 1.05), rows * depth)
    for rows, depth in ((5, 30_000), (64, 30_000), (64, 0), (30, 10_000)):
        assert seconds.expected(rows, rows * depth) == pytest.approx(truly(rows, rows * depth), rel=0.35)


def test_a_step_that_something_else_held_up_is_half_believed() -> None:
    seconds = StepSeconds(lambda rows: 1.0)
    seconds.tell(4, 1.0)
    seconds.tell(4, 50.0)
    assert seconds.expected(4) == pytest.approx(1.2)
    for _ in range(60):
        seconds.tell(4, 50.0)
    assert seconds.expected(4) == pytest.approx(50.0, rel=0.01)


def test_the_same_times_give_the_same_chunks() -> None:
    first, second = (read_beside_streams(Timed(linear, max_itl=1.5)) for _ in range(2))
    assert first == second
    pace = Pace(lambda rows: 1.0 + rows)
    assert pace.prompt_rows(4, 100) == 100  # nothing is known yet


def test_the_setting_is_in_milliseconds() -> None:
    from hybrid import LLM

    assert EngineConfig().max_itl_ms is None
    with LLM(max_itl_ms=250, threads=1) as llm:
        assert llm.engine.plan.max_itl == 0.25
