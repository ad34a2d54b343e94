"""Prompts of strangers that begin alike: computed once, the same tokens and bits, and nobody loses what is theirs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from dummy_engine import DummyEngine, reference_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import open_engine
from test_kept import arrive, request, rows, run

from hybrid.serving.request import Request
from hybrid.serving.scheduler import Scheduler

SYSTEM = list(range(1, 33))  # two blocks of keys


def test_a_stranger_s_prefix_is_copied_and_stays_theirs() -> None:
    engine = DummyEngine()
    scheduler = Scheduler(engine)
    (first,) = run(scheduler, request([*SYSTEM, *range(90, 110)]))
    rows(engine)
    (second,) = run(scheduler, request([*SYSTEM, 7, 7, 7]))
    assert rows(engine) == 3 + 3 and second.completion.cached_tokens == 32
    assert second.completion.token_ids == reference_tokens([*SYSTEM, 7, 7, 7], 4)
    turn = [*SYSTEM, *range(90, 110), *first.completion.token_ids, 5]
    assert run(scheduler, request(turn, 2))[0].completion.cached_tokens == 55  # all that was computed


def test_prompts_that_arrive_together_are_read_once() -> None:
    engine = DummyEngine(max_rows=8)
    scheduler = Scheduler(engine)
    entries = run(scheduler, *(request([*SYSTEM, token], 2) for token in (40, 41, 42)))
    assert rows(engine) == 33 + 1 + 2 * (1 + 1)
    assert [entry.completion.cached_tokens for entry in entries] == [0, 32, 32]
    assert all(entry.completion.token_ids == reference_tokens(entry.prompt.tolist(), 2) for entry in entries)


def test_what_is_running_is_copied_too() -> None:
    engine = DummyEngine()
    scheduler = Scheduler(engine)
    scheduler.add(request([*SYSTEM, 1], 20, keep=False))
    while not scheduler._running or scheduler._running[0].pending > 1:
        scheduler.step()
    (entry,) = run(scheduler, request([*SYSTEM, 2]))
    assert entry.completion.cached_tokens == 32


def test_who_is_read_by_another_waits_no_longer_than_that_one_lives() -> None:
    engine = DummyEngine(max_rows=8)
    scheduler = Scheduler(engine)
    first, second = request([*SYSTEM, 1], keep=False), request([*SYSTEM, 2])
    scheduler.add(first)
    scheduler.add(second)
    scheduler.step()
    assert scheduler._running == [first]
    scheduler.cancel(first)
    run(scheduler)
    assert second.completion.cached_tokens == 0
    assert second.completion.token_ids == reference_tokens([*SYSTEM, 2], 4)


@pytest.mark.parametrize("plan", [{"sequences": 1}, {"kv_token_budget": 64}])
def test_without_room_for_both_what_was_left_behind_goes_on(plan: dict[str, int]) -> None:
    engine = DummyEngine(**plan)
    scheduler = Scheduler(engine)
    run(scheduler, request([*SYSTEM, *range(60, 82)]))
    (entry,) = run(scheduler, request([*SYSTEM, 9]))
    assert entry.completion.cached_tokens == 32 and len(scheduler._kept) == 1


@pytest.mark.parametrize("plan", [{"repeatable": False}, {}])
def test_what_must_be_computed_is(plan: dict[str, Any]) -> None:
    engine = DummyEngine(**plan)
    if not plan:
        engine.routes = SimpleNamespace(matter=True)
    entries = run(Scheduler(engine), *(request([*SYSTEM, token], 2) for token in (40, 41)))
    assert [entry.completion.cached_tokens for entry in entries] == [0, 0]


ARRIVALS = st.tuples(
    st.integers(0, 2),  # which system prompt
    st.integers(0, 40),  # how much of it
    st.lists(st.integers(0, 3), min_size=1, max_size=4),  # the question
    st.booleans(),  # whether it keeps
    st.integers(0, 6),  # tokens to produce
    st.integers(0, 3),  # steps until the next one arrives
    st.booleans(),  # whether it is cancelled then
)


def shared_with_others(
    make: Callable[..., Request],
    which: int,
    much: int,
    question: list[int],
    keep: bool,
    count: int,
    steps: int,
    cancelled: bool,
) -> tuple[Request, int, bool]:
    """What `ARRIVALS` draws, as `arrive` takes it."""
    return make([*[which + 10] * much, *question], count, keep), steps, cancelled


@settings(max_examples=60)
@given(st.lists(ARRIVALS, max_size=12), st.integers(64, 200), st.integers(1, 4), st.booleans())
def test_whatever_is_shared_tokens_are_those_of_a_fresh_start(
    arrivals, budget: int, sequences: int, repeatable: bool
) -> None:
    engine = DummyEngine(kv_token_budget=budget, sequences=sequences, repeatable=repeatable)
    arrive(Scheduler(engine), [shared_with_others(request, *arrival) for arrival in arrivals])


CASES = {
    "mixtral": ("mixtral", {}),
    "window and sinks": ("gpt_oss", {"kv_format": "int8"}),
    "keys and values in fp8": ("qwen3", {"kv_format": "fp8"}),
    "latents": ("deepseek_v3", {}),
    "latents in int8": ("deepseek_v3", {"kv_format": "int8"}),
    "latents of which some are selected": ("deepseek_v32", {}),
    "expert cache": ("mixtral", {"device": "simulated"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_copied_prefix_has_the_bits_of_one_that_is_computed(tmp_path, case: str) -> None:
    family, choices = CASES[case]
    system = np.random.default_rng(6).integers(0, 131, 200).tolist()
    path = write_checkpoint(tmp_path / "model", family)
    with open_engine(path, tmp_path / "cache", max_seq_len=256, **choices) as engine:
        shared, alone = Scheduler(engine), Scheduler(engine)
        first, second = (request([*system, *tail], 8, ignore_eos=True, logprobs=131) for tail in ([3, 5, 9], [4]))
        run(shared, first, second)
        shared.forget()
        fresh = request([*system, 4], 8, keep=False, ignore_eos=True, logprobs=131)
        run(alone, fresh)
    assert second.completion.cached_tokens == 192 and fresh.completion.cached_tokens == 0
    assert second.completion.token_ids == fresh.completion.token_ids
    assert second.completion.logprobs == fresh.completion.logprobs
