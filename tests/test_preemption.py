"""Memory is reserved as texts grow; where there is no more, the last gives way, and loses nothing but time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from checkpoints import write_checkpoint
from dummy_engine import DummyEngine, reference_tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from steps import open_engine
from test_kept import arrive, request, run

from hybrid.serving import admission
from hybrid.serving.request import LogitsScore
from hybrid.serving.scheduler import Scheduler, StepRecord


@pytest.fixture(autouse=True)
def little_headroom(monkeypatch) -> None:
    monkeypatch.setattr(admission, "HEADROOM", 2)


def observed(engine: DummyEngine) -> tuple[Scheduler, list[StepRecord]]:
    scheduler, records = Scheduler(engine), list[StepRecord]()
    scheduler.on_step = records.append
    return scheduler, records


def test_requests_that_may_fill_the_memory_run_together() -> None:
    engine = DummyEngine(kv_token_budget=64, max_seq_len=64)
    scheduler, records = observed(engine)
    entries = run(scheduler, *(request([1, 2, 3, token], 60) for token in range(4)))
    assert records[4].decode_rows == 4
    assert sum(record.preempted for record in records) > 0
    for entry in entries:
        assert entry.completion.token_ids == reference_tokens(entry.prompt.tolist(), 60)
        assert [t for delta in entry.deltas for t in delta.token_ids] == entry.completion.token_ids
        assert entry.completion.finish_reason == "length" and entry.completion.cached_tokens == 0


def test_the_youngest_of_the_least_urgent_gives_way() -> None:
    engine = DummyEngine(kv_token_budget=64, max_seq_len=64, max_rows=64)
    scheduler, _ = observed(engine)
    urgent = request([1] * 15, 40, priority=-1)
    entries = [request([2] * 15, 40), request([3] * 15, 40), urgent]
    scheduler.add(*entries)
    scheduler.step()
    assert scheduler._running == [urgent, *entries[:2]]
    while not scheduler._waiting:
        scheduler.step()
    assert scheduler._waiting == [entries[1]] and entries[1].sequence is None
    while not urgent.finished:
        scheduler.step()
        assert urgent in scheduler._running or urgent.finished
    run(scheduler)
    assert [e.completion.token_ids for e in entries] == [reference_tokens(e.prompt.tolist(), 40) for e in entries]


def starts(scheduler: Scheduler, *entries) -> None:
    """They have a sequence and a token each."""
    for entry in entries:
        scheduler.add(entry)
        scheduler.step()
        assert entry.length > len(entry.prompt)


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_an_urgent_request_takes_the_place_of_the_youngest_of_the_least_urgent(repeatable: bool, keep: bool) -> None:
    engine = DummyEngine(sequences=3, max_rows=64, max_seq_len=64, repeatable=repeatable, prefix_bytes=64)
    scheduler, records = observed(engine)
    entries = [request([token] * 9, 20, keep, priority=priority) for token, priority in enumerate((1, 2, 2))]
    starts(scheduler, *entries)
    starts(scheduler, urgent := request([9] * 9, 20, keep), more := request([8] * 9, 20, keep, priority=1))
    assert [entry.sequence is None for entry in entries] == [False, True, True]
    assert [record.preempted for record in records] == [0, 0, 0, 1, 1]
    run(scheduler, equal := request([7] * 9, 3, keep, priority=2))
    for entry in (*entries, urgent, more, equal):
        assert entry.completion.token_ids == reference_tokens(entry.prompt.tolist(), entry.params.max_tokens)
    assert sum(record.preempted for record in records) == 2, "of the same priority nobody gives way"


def test_only_as_many_give_way_as_make_room_and_nobody_where_all_would_not() -> None:
    engine = DummyEngine(sequences=8, max_rows=64, max_seq_len=64, kv_token_budget=64)
    scheduler, records = observed(engine)
    entries = [
        request([token] * size, 8, priority=priority)
        for token, (size, priority) in enumerate(((20, 0), (9, 1), (9, 1)))
    ]
    starts(scheduler, *entries)
    starts(scheduler, request([7] * 22, 1))
    assert [entry.sequence is None for entry in entries] == [False, False, True]
    scheduler.add(large := request([8] * 50, 1))
    scheduler.step()
    assert large.sequence is None and entries[1].sequence is not None
    run(scheduler)
    assert [entry.completion.token_ids for entry in entries] == [
        reference_tokens([t] * n, 8) for t, n in ((0, 20), (1, 9), (2, 9))
    ]


def test_nobody_gives_way_to_who_waits_for_a_prompt_being_read() -> None:
    """He would come back at once, and give way again in every step."""
    engine = DummyEngine(sequences=2, max_rows=4, max_seq_len=64, prefix_bytes=256)
    scheduler, records = observed(engine)
    starts(scheduler, later := request([5] * 3, 20, priority=1))
    scheduler.add(first := request([6] * 40, 2))
    scheduler.step()
    scheduler.add(second := request([6] * 40, 3))
    while first.computed < 32:  # what there is to share
        assert later.sequence is not None
        scheduler.step()
    run(scheduler)
    assert sum(record.preempted for record in records) <= 1 and second.completion.cached_tokens == 32


def test_nobody_gives_way_to_who_would_wait_for_the_rows_of_another_prompt() -> None:
    """The place would stay empty until that prompt was read."""
    engine = DummyEngine(sequences=2, max_rows=4, max_seq_len=256)
    scheduler, records = observed(engine)
    starts(scheduler, later := request([5] * 3, 60, priority=1))
    scheduler.add(long := request([*range(6, 106)], 2))
    scheduler.step()
    scheduler.add(request([7] * 4, 2))
    while long.pending > 1:
        assert later.sequence is not None
        scheduler.step()
    run(scheduler)
    assert sum(record.preempted for record in records) <= 1


def test_where_routes_are_recorded_nobody_gives_way_to_the_urgent() -> None:
    engine = DummyEngine(sequences=1)
    engine.routes = type("Routes", (), {"matter": True})()
    scheduler, records = observed(engine)
    starts(scheduler, request([5] * 3, 20, priority=1))
    run(scheduler, request([6] * 3, 2))
    assert not any(record.preempted for record in records)


def test_what_was_left_behind_gives_way_before_anybody_else() -> None:
    engine = DummyEngine(kv_token_budget=64, max_seq_len=64)
    scheduler, records = observed(engine)
    run(scheduler, request([9] * 20, 2))
    run(scheduler, request([1] * 4, 50))
    assert not any(record.preempted for record in records) and len(scheduler._kept) == 1


def test_a_score_that_gave_way_has_every_logit_once() -> None:
    engine = DummyEngine(kv_token_budget=64, max_seq_len=64, max_rows=8)
    scheduler, records = observed(engine)
    scheduler.add(first := request([5] * 4, 55))
    while first.pending > 1:
        scheduler.step()
    scheduler.add(score := LogitsScore(np.arange(58, dtype=np.int32), 300))
    run(scheduler)
    score2 = LogitsScore(np.arange(40, dtype=np.int32), 300)
    scheduler.add(request([5] * 4, 55), score2)
    run(scheduler)
    for done in (score, score2):
        wanted = [reference_tokens(list(range(n)), 1)[0] for n in range(1, len(done.prompt) + 1)]
        assert done.result.argmax(axis=1).tolist() == wanted


def test_where_routes_are_recorded_every_token_is_computed_once() -> None:
    engine = DummyEngine(kv_token_budget=64, max_seq_len=64)
    engine.routes = type("Routes", (), {"matter": True})()
    scheduler, records = observed(engine)
    run(scheduler, *(request([token] * 4, 40) for token in range(4)))
    assert sum(len(batch.token_ids) for batch in engine.steps) == 4 * (4 + 40 - 1)
    assert not any(record.preempted for record in records)


ARRIVALS = st.tuples(
    st.integers(1, 30),  # tokens of the prompt
    st.integers(0, 40),  # tokens to produce
    st.integers(-1, 1),  # priority
    st.booleans(),  # whether it keeps
    st.integers(0, 9),  # steps until the next one arrives
    st.booleans(),  # whether it is cancelled then
)


NOTHING = (1, 0, 0, False, 0, False)
# One that ends has memory for more tokens than it came to, which the pool is not to have meanwhile.
HELD_MORE = [*[NOTHING] * 7, (1, 22, 0, True, 0, False), (10, 20, 0, False, 0, False), (1, 17, 0, True, 0, False)]


@settings(max_examples=80)
@given(st.lists(ARRIVALS, max_size=10), st.integers(64, 120), st.integers(3, 16), st.booleans())
@example(HELD_MORE, 64, 3, True)
def test_whoever_gives_way_has_the_tokens_of_one_alone(arrivals, budget: int, rows: int, repeatable: bool) -> None:
    engine = DummyEngine(kv_token_budget=budget, max_rows=rows, repeatable=repeatable, prefix_bytes=budget)
    scheduler = Scheduler(engine)
    arrive(
        scheduler,
        [
            (request([7, *range(length - 1)], count, keep, priority=priority), steps, cancelled)
            for length, count, priority, keep, steps, cancelled in arrivals
        ],
    )
    assert not scheduler._fairness._jobs


@pytest.mark.parametrize("family", ["mixtral", "lfm2"])
def test_who_gave_way_goes_on_with_the_same_bits(tmp_path, family: str) -> None:
    prompts = np.random.default_rng(7).integers(0, 131, (3, 30))
    path = write_checkpoint(tmp_path / "model", family)
    with open_engine(path, tmp_path / "cache", max_seq_len=128) as engine:
        entries = [
            [request(prompt, 50, keep, temperature=0.8, seed=3, ignore_eos=True, logprobs=20) for prompt in prompts]
            for keep in (False, True)
        ]
        for alone in entries[0]:
            run(Scheduler(engine), alone)
        engine.plan = replace(engine.plan, kv_token_budget=130)
        scheduler, records = observed(engine)
        run(scheduler, *entries[1])
        assert sum(record.preempted for record in records) > 0
    for alone, together in zip(*entries, strict=True):
        assert together.completion.token_ids == alone.completion.token_ids
        assert together.completion.logprobs == alone.completion.logprobs
