"""Continuous batching on an engine that asserts the batch contract: right tokens, right limits, no sequence lost."""

from __future__ import annotations

import numpy as np
import pytest
from dummy_engine import DummyEngine, reference_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.core import SamplingParams
from hybrid.errors import KernelError, RequestError
from hybrid.serving.request import LogitsScore, Request
from hybrid.serving.scheduler import Scheduler, StepRecord


def request(prompt: list[int], max_tokens: int = 5, eos: frozenset[int] = frozenset(), **fields) -> Request:
    return Request(np.array(prompt, np.int32), SamplingParams(max_tokens=max_tokens, **fields), eos)


def run(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        scheduler.step()
        check_integrity(scheduler)


def check_integrity(scheduler: Scheduler) -> None:
    """Running requests have sequences of their own and keep within the limits."""
    running, waiting, plan = scheduler._running, scheduler._waiting, scheduler._plan
    used = [entry.sequence for entry in running]
    assert set(used) <= set(range(plan.sequences)) and len(set(used)) == len(used), used
    assert sum(entry.reserved for entry in running) <= plan.kv_token_budget
    for entry in running:
        assert not entry.finished
        assert 0 <= entry.computed <= entry.length < len(entry.tokens) <= plan.max_seq_len
    assert all(entry.sequence is None and not entry.finished for entry in waiting)


def started(*requests: Request, **plan) -> tuple[DummyEngine, Scheduler]:
    engine = DummyEngine(**plan)
    scheduler = Scheduler(engine)
    for entry in requests:
        scheduler.add(entry)
    return engine, scheduler


@settings(max_examples=60)
@given(
    prompts=st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=30), min_size=1, max_size=9),
    counts=st.lists(st.integers(0, 8), min_size=9, max_size=9),
    late=st.integers(0, 9),
    max_rows=st.integers(4, 20),
    budget=st.integers(64, 256),
)
def test_every_mix_of_prompts_gives_the_tokens_of_each_alone(prompts, counts, late, max_rows, budget) -> None:
    engine = DummyEngine(max_rows=max_rows, kv_token_budget=budget)
    scheduler = Scheduler(engine)
    requests = [request(p, n) for p, n in zip(prompts, counts, strict=False)]
    for entry in requests[:late]:
        scheduler.add(entry)
    scheduler.step()
    for entry in requests[late:]:
        scheduler.add(entry)
    run(scheduler)
    for entry, prompt, count in zip(requests, prompts, counts, strict=False):
        assert entry.completion.token_ids == reference_tokens(prompt, count)
        assert entry.completion.finish_reason == "length"
        assert sum((delta.token_ids for delta in entry.deltas), ()) == tuple(entry.completion.token_ids)
        assert [bool(delta.finish_reason) for delta in entry.deltas][:-1] == [False] * (len(entry.deltas) - 1)
    assert engine.sequences == {}


def test_decoding_requests_get_their_row_before_any_prompt() -> None:
    first, second = request([1], 20), request(list(range(30)), 3)
    engine, scheduler = started(first, max_rows=8)
    scheduler.step()
    scheduler.add(second)
    run(scheduler)
    assert [batch.token_ids.size for batch in engine.steps[1:6]] == [8, 8, 8, 8, 3]
    assert all(first_row == 0 for first_row in (batch.logit_rows[0] for batch in engine.steps[1:6]))


def test_prompts_are_admitted_in_order_of_arrival() -> None:
    requests = [request([i] * 10, 3) for i in range(6)]
    engine, scheduler = started(*requests, sequences=2)
    run(scheduler)
    seen = list(dict.fromkeys(int(t) for batch in engine.steps for t in batch.token_ids if t < 6))
    assert seen == list(range(6))


def test_the_memory_budget_limits_what_runs_together() -> None:
    requests = [request([1] * 20, 10) for _ in range(4)]
    engine, scheduler = started(*requests, kv_token_budget=64)
    most = 0
    while scheduler.has_work:
        scheduler.step()
        most = max(most, len(engine.sequences))
    assert most == 2


def test_a_prompt_over_the_limit_says_both_numbers() -> None:
    _, scheduler = started(max_seq_len=16)
    with pytest.raises(RequestError, match="17 tokens.* 16 "):
        scheduler.add(request([1] * 17))
    assert not scheduler.has_work


def test_generation_stops_where_the_sequence_is_full() -> None:
    entry = request([1] * 10, 100)
    _, scheduler = started(entry, max_seq_len=16)
    run(scheduler)
    assert entry.completion.token_ids == reference_tokens([1] * 10, 6)
    assert entry.completion.finish_reason == "length"


@pytest.mark.parametrize(("prompt", "max_tokens"), [([1, 2], 0), ([1] * 16, 5)])
def test_no_room_for_a_token_completes_without_a_step(prompt: list[int], max_tokens: int) -> None:
    entry = request(prompt, max_tokens)
    engine, scheduler = started(entry, max_seq_len=16)
    assert scheduler.step() == [entry]
    assert (entry.completion.token_ids, entry.completion.finish_reason) == ([], "length")
    assert not engine.steps and not scheduler.has_work


@pytest.mark.parametrize("prompt", [[], [300], [-1]])
def test_prompts_that_are_no_tokens_are_refused(prompt: list[int]) -> None:
    _, scheduler = started()
    with pytest.raises(RequestError):
        scheduler.add(request(prompt))


def test_eos_ends_the_text_unless_ignored() -> None:
    eos = frozenset([reference_tokens([5, 6], 3)[2]])
    stops, ignores = request([5, 6], 8, eos), request([5, 6], 8, eos, ignore_eos=True)
    _, scheduler = started(stops, ignores)
    run(scheduler)
    assert stops.completion.finish_reason == "stop"
    assert stops.completion.token_ids == reference_tokens([5, 6], 3)
    assert len(ignores.completion.token_ids) == 8


def test_cancelling_frees_the_sequence_and_leaves_the_others_alone() -> None:
    requests = [request([i, i], 6) for i in range(3)]
    engine, scheduler = started(*requests, sequences=2)
    scheduler.step()
    scheduler.cancel(requests[0])
    scheduler.cancel(requests[0])
    check_integrity(scheduler)
    run(scheduler)
    assert requests[0].completion.finish_reason == "cancelled"
    assert [delta.finish_reason for delta in requests[0].deltas].count("cancelled") == 1
    for i in (1, 2):
        assert requests[i].completion.token_ids == reference_tokens([i, i], 6)


def test_cancelling_a_waiting_request_takes_it_from_the_queue() -> None:
    requests = [request([1], 3), request([2], 3)]
    engine, scheduler = started(*requests, sequences=1)
    scheduler.step()
    scheduler.cancel(requests[1])
    run(scheduler)
    assert not any(2 in batch.token_ids and batch.positions[0] == 0 for batch in engine.steps)


@pytest.mark.parametrize("error", [KernelError("broken"), KeyboardInterrupt()])
def test_a_step_that_fails_frees_every_slot(error: BaseException) -> None:
    def fail(batch) -> None:
        if len(engine.steps) == 3:
            raise error

    engine = DummyEngine(fail=fail, sequences=2)
    scheduler = Scheduler(engine)
    requests = [request([i], 9) for i in range(3)]
    for entry in requests:
        scheduler.add(entry)
    scheduler.step()
    scheduler.step()
    assert scheduler.step() == requests[:2]
    check_integrity(scheduler)
    assert engine.sequences == {}
    assert [entry.error for entry in requests] == [error, error, None]
    run(scheduler)  # the one that waited goes on
    assert requests[2].completion.token_ids == reference_tokens([2], 9)


def test_logits_that_are_no_numbers_end_their_request_only() -> None:
    engine = DummyEngine(next_token=lambda tokens: 7)
    whole = engine.forward

    def forward(batch):
        result = whole(batch)
        result.logits[[i for i, row in enumerate(batch.logit_rows) if batch.sequences[row] == bad.sequence]] = np.nan
        return result

    engine.forward = forward  # type: ignore[method-assign]
    scheduler = Scheduler(engine)
    bad, good = request([1], 4), request([2], 4)
    scheduler.add(bad)
    scheduler.add(good)
    run(scheduler)
    assert isinstance(bad.error, KernelError) and good.error is None
    assert good.completion.token_ids == [7] * 4


def test_scoring_waits_for_a_sequence_and_gives_logits_at_every_position() -> None:
    entry = request([1, 2], 4)
    engine, scheduler = started(entry, sequences=1, max_rows=3)
    scheduler.step()
    score, late = LogitsScore(np.arange(10, dtype=np.int32), 300), request([3], 2)
    scheduler.add(score)
    scheduler.add(late)
    done = [job for _ in range(9) for job in scheduler.step() if job.finished]
    assert done == [entry, score, late] and not scheduler.has_work  # in the order of their arrival
    logits = score.result
    assert logits.shape == (10, 300) and logits.dtype == np.float32
    assert [int(row.argmax()) for row in logits] == [reference_tokens(list(range(n)), 1)[0] for n in range(1, 11)]
    assert entry.completion.token_ids == reference_tokens([1, 2], 4)
    assert late.completion.token_ids == reference_tokens([3], 2)
    assert engine.sequences == {}


def test_a_score_that_is_cancelled_leaves_the_steps_to_others() -> None:
    score, entry = LogitsScore(np.arange(10, dtype=np.int32), 300), request([3], 2)
    engine, scheduler = started(score, entry, max_rows=4)
    scheduler.step()
    assert engine.sequences
    scheduler.cancel(score)
    assert not engine.sequences and isinstance(score.error, RequestError)
    run(scheduler)
    assert entry.completion.token_ids == reference_tokens([3], 2)


def test_a_scoring_step_that_fails_frees_the_slot() -> None:
    def fail(batch) -> None:
        raise KernelError("broken")

    score = LogitsScore(np.arange(4, dtype=np.int32), 300)
    engine, scheduler = started(score, fail=fail)
    assert scheduler.step() == [score]
    assert isinstance(score.error, KernelError) and engine.sequences == {} and not scheduler.has_work


def test_a_failed_step_ends_those_whose_rows_it_had() -> None:
    """The third prompt has a sequence and no row yet."""

    def fail(batch) -> None:
        if len(engine.steps) == 1:
            raise KernelError("broken")

    engine = DummyEngine(fail=fail, max_rows=8)
    scheduler = Scheduler(engine)
    requests = [request([i] * 4, 3) for i in range(3)]
    for entry in requests:
        scheduler.add(entry)
    assert scheduler.step() == requests[:2]
    run(scheduler)
    assert [entry.error is None for entry in requests] == [False, False, True]
    assert requests[2].completion.token_ids == reference_tokens([2] * 4, 3)


def test_an_observer_that_raises_is_called_no_more() -> None:
    def observe(record: StepRecord) -> None:
        calls.append(record)
        raise ValueError("full")

    calls: list[StepRecord] = []
    entry = request([1], 4)
    _, scheduler = started(entry)
    scheduler.on_step = observe
    run(scheduler)
    assert len(calls) == 1 and str(scheduler.observer_error) == "full"
    assert entry.completion.token_ids == reference_tokens([1], 4)


def test_what_the_text_of_one_request_raises_is_its_own() -> None:
    class Broken:
        stopped = False

        def push(self, token: int) -> str:
            raise UnicodeError("no such token")

    bad = Request(np.array([1], np.int32), SamplingParams(max_tokens=4), frozenset(), Broken())  # type: ignore[arg-type]
    good = request([2], 4)
    engine, scheduler = started(bad, good)
    run(scheduler)
    assert isinstance(bad.error, UnicodeError) and good.completion.token_ids == reference_tokens([2], 4)
    assert engine.sequences == {}


def test_steps_report_their_rows_and_times() -> None:
    records: list[StepRecord] = []
    engine, scheduler = started(request(list(range(10)), 3), max_rows=8)
    scheduler.on_step = records.append
    run(scheduler)
    assert [(r.prompt_rows, r.decode_rows, r.sampled) for r in records] == [(8, 0, 0), (2, 0, 1), (0, 1, 1), (0, 1, 1)]
    for record in records:
        parts = record.times
        assert parts.attention == 0.001 and parts.sampling > 0
        assert parts.total == pytest.approx(0.010 + parts.sampling)
        assert record.seconds > 0


def test_a_large_seeded_batch_samples_what_each_samples_alone() -> None:
    def tokens(*prompts: list[int]) -> list[list[int]]:
        entries = [request(p, 12, temperature=3.0, top_p=0.95, seed=11) for p in prompts]
        _, scheduler = started(*entries)
        run(scheduler)
        return [entry.completion.token_ids for entry in entries]

    prompts = [[1, 2, 3], [4] * 9, [5]]
    assert tokens(*prompts) == [tokens(prompt)[0] for prompt in prompts]
