"""Whose turn it is: by priority, then to the client that has got least, then in order of arrival."""

from __future__ import annotations

import numpy as np
from dummy_engine import DummyEngine, reference_tokens
from test_kept import request

from hybrid.serving.fairness import Fairness
from hybrid.serving.request import LogitsScore, Request
from hybrid.serving.scheduler import Scheduler


def of(client: str, prompt: list[int], max_tokens: int = 2, **fields) -> Request:
    entry = request(prompt, max_tokens, keep=False, **fields)
    entry.client = client
    return entry


def order_of_ends(scheduler: Scheduler) -> list[Request]:
    ended: list[Request] = []
    while scheduler.has_work:
        ended += [job for job in scheduler.step() if job.finished]
    return ended


def test_a_client_of_many_requests_does_not_hold_up_one_of_few() -> None:
    many = [of("many", [1] * 20) for _ in range(6)]
    few = of("few", [2] * 20)
    scheduler = Scheduler(DummyEngine(max_rows=10, sequences=2))
    scheduler.add(*many, few)
    ended = order_of_ends(scheduler)
    assert ended.index(few) <= 1 and [job for job in ended if job is not few] == many


def test_a_long_prompt_of_another_client_is_overtaken_and_still_read() -> None:
    long, short = of("long", [1] * 50), of("short", [2] * 4)
    scheduler = Scheduler(DummyEngine(max_rows=8))
    scheduler.add(long)
    scheduler.step()
    scheduler.add(short)
    assert order_of_ends(scheduler) == [short, long]
    assert long.completion.token_ids == reference_tokens([1] * 50, 2)


def test_a_lower_number_comes_first_and_equals_come_as_they_arrived() -> None:
    entries = [of("", [1] * 8, priority=priority) for priority in (0, 3, -2, 0, -2)]
    scheduler = Scheduler(DummyEngine(max_rows=8, sequences=1))
    scheduler.add(*entries)
    assert order_of_ends(scheduler) == [entries[2], entries[4], entries[0], entries[3], entries[1]]


def test_who_waits_for_a_prompt_that_is_read_lends_it_its_turn() -> None:
    """Otherwise an urgent request would wait for one that is read after all others."""
    system = list(range(1, 33))
    reader, urgent = request([*system, 40], priority=5), request([*system, 41], priority=-1)
    between = of("", [9] * 40, priority=0)
    engine = DummyEngine(max_rows=8)
    scheduler = Scheduler(engine)
    scheduler.add(reader)
    scheduler.step()
    scheduler.add(between, urgent)
    assert order_of_ends(scheduler).index(between) == 2
    assert urgent.completion.cached_tokens == 32


def test_who_comes_back_has_saved_up_nothing() -> None:
    fairness = Fairness()
    fairness.enter("a")
    fairness.charge("a", 100, 10)
    fairness.enter("b")
    assert fairness.got("b") == fairness.got("a") == 110  # not 0: b was not there
    fairness.charge("b", 5, 0)
    fairness.leave("a")
    fairness.charge("b", 50, 0)
    fairness.enter("a")
    assert fairness.got("a") == 165


def test_who_was_served_more_is_not_forgotten_by_leaving() -> None:
    fairness = Fairness()
    for client in ("a", "b"):
        fairness.enter(client)
    fairness.charge("a", 100, 0)
    fairness.leave("a")
    fairness.enter("a")
    assert (fairness.got("a"), fairness.got("b")) == (100, 0)
    for client in ("a", "b"):
        fairness.leave(client)
    fairness.enter("c")
    assert fairness.got("c") == 0  # what the last of them had


def test_clients_that_are_gone_are_forgotten() -> None:
    fairness = Fairness()
    for number in range(100):
        fairness.enter(str(number))
        fairness.charge(str(number), number, 0)
        fairness.leave(str(number))
    assert len(fairness._got) <= 1 and not fairness._jobs


def test_a_score_is_computed_beside_texts_that_go_on() -> None:
    entry = of("", [1, 2], 12)
    engine = DummyEngine(max_rows=4)
    scheduler = Scheduler(engine)
    scheduler.add(entry)
    scheduler.step()
    score = LogitsScore(np.arange(9, dtype=np.int32), 300)
    scheduler.add(score)
    while not score.finished:
        scheduler.step()
    assert [len(batch.token_ids) for batch in engine.steps] == [2, 4, 4, 4]
    wanted = [reference_tokens(list(range(n)), 1)[0] for n in range(1, 10)]
    assert score.result.argmax(axis=1).tolist() == wanted
    order_of_ends(scheduler)
    assert entry.completion.token_ids == reference_tokens([1, 2], 12)
