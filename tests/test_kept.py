"""Keys and values that outlive their request: tokens and bits are as without, and nothing is computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from dummy_engine import DummyEngine, reference_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import open_engine

from hybrid.core import SamplingParams
from hybrid.errors import KernelError, StepCancelled
from hybrid.serving.kept import Kept, KeptSequences
from hybrid.serving.pool import PrefixPool
from hybrid.serving.request import LogitsScore, Request
from hybrid.serving.scheduler import Scheduler


def request(prompt: list[int], max_tokens: int = 4, keep: bool = True, **fields: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **fields)
    return Request(np.array(prompt, np.int32), params, keep=keep)


def run(scheduler: Scheduler, *requests: Request) -> list[Request]:
    for entry in requests:
        scheduler.add(entry)
    while scheduler.has_work:
        scheduler.step()
        check_integrity(scheduler)
    return list(requests)


def arrive(scheduler: Scheduler, arrivals: Sequence[tuple[Request, int, bool]]) -> None:
    """Requests come one after the other, each followed by so many steps and perhaps cancelled then. Whatever they share
    and wherever they wait, each has the tokens of one alone, and nothing is left behind in the end.
    """
    for entry, steps, cancelled in arrivals:
        scheduler.add(entry)
        for _ in range(steps):
            scheduler.step()
            check_integrity(scheduler)
        if cancelled:
            scheduler.cancel(entry)
    run(scheduler)
    for entry, *_ in arrivals:
        prompt, produced = entry.prompt.tolist(), entry.completion.token_ids
        count = scheduler._limit(entry) - len(prompt)
        assert entry.error is None and produced == reference_tokens(prompt, count)[: len(produced)]
        assert len(produced) == count or entry.completion.finish_reason == "cancelled"
    scheduler.forget()
    assert scheduler._engine.sequences == {} and scheduler._admission.pool.nbytes == 0


def check_integrity(scheduler: Scheduler) -> None:
    running, kept, plan = scheduler._running, scheduler._kept, scheduler._plan
    used = [entry.sequence for entry in running] + [entry.sequence for entry in kept._kept]
    assert len(set(used)) == len(used) <= plan.sequences and set(used) <= set(range(plan.sequences))
    tokens = sum(entry.reserved for entry in running) + kept.tokens
    assert tokens <= plan.kv_token_budget
    check_pool(scheduler._admission.pool, plan.state_bytes - tokens * plan.kv.token_bytes)


def check_pool(pool: PrefixPool, room: int) -> None:
    nodes = list(pool._used)
    assert pool.nbytes == sum(node.nbytes for node in nodes) <= min(pool.limit, max(0, room))
    place = {node: at for at, node in enumerate(nodes)}
    for node in nodes:
        assert node.parent.children[node.key] is node and place.get(node.parent, len(nodes)) > place[node]
        assert node.children or node.state is not None or pool._rewindable
    assert sum(len(node.children) for node in [*nodes, *pool._roots.values()]) == len(nodes)


def rows(engine: DummyEngine) -> int:
    """How many rows were computed since it was last asked."""
    count = sum(len(batch.token_ids) for batch in engine.steps)
    engine.steps.clear()
    return count


def test_only_what_is_new_is_computed() -> None:
    engine = DummyEngine()
    scheduler = Scheduler(engine)
    first = [1, 2, 3, 4, 5]
    (answer,) = run(scheduler, request(first))
    assert rows(engine) == 5 + 3  # the last token was never computed
    second = [*first, *answer.completion.token_ids, 9, 9]
    (answer,) = run(scheduler, request(second))
    assert rows(engine) == 1 + 2 + 3 and answer.completion.cached_tokens == 8
    assert answer.completion.token_ids == reference_tokens(second, 4)
    (again,) = run(scheduler, request(second))  # another answer to the same question
    assert rows(engine) == 1 + 3 and again.completion.token_ids == answer.completion.token_ids
    scheduler.forget()
    assert engine.sequences == {}


def test_what_does_not_keep_neither_takes_nor_leaves() -> None:
    engine = DummyEngine()
    scheduler = Scheduler(engine)
    run(scheduler, request([1, 2, 3]))
    (other,) = run(scheduler, request([1, 2, 3], keep=False))
    assert other.completion.cached_tokens == 0 and len(scheduler._kept) == 1 == len(engine.sequences)


ACTIONS = st.tuples(
    st.integers(0, 3),  # which conversation
    st.integers(0, 12),  # how many of its tokens stay
    st.lists(st.integers(0, 3), min_size=1, max_size=6),  # what is new
    st.booleans(),  # whether it keeps
    st.integers(0, 6),  # tokens to produce
)


@settings(max_examples=40)
@given(st.lists(ACTIONS, max_size=14), st.integers(40, 120), st.booleans(), st.integers(1, 4), st.integers(1, 3))
def test_tokens_are_those_of_a_fresh_start(
    actions, budget: int, repeatable: bool, sequences: int, together: int
) -> None:
    engine = DummyEngine(kv_token_budget=budget, repeatable=repeatable, sequences=sequences)
    scheduler = Scheduler(engine)
    texts: list[list[int]] = [[] for _ in range(4)]
    for start in range(0, len(actions), together):
        requests = []
        for which, stay, new, keep, count in actions[start : start + together]:
            texts[which] = ([*texts[which][:stay], *new])[-30:]
            requests.append((which, texts[which], count, request(texts[which], count, keep)))
        run(scheduler, *(entry for *_, entry in requests))
        for which, prompt, count, entry in requests:
            assert entry.completion.token_ids == reference_tokens(prompt, count)
            texts[which] = [*prompt, *entry.completion.token_ids][:30]
    scheduler.forget()
    assert engine.sequences == {}


def test_what_is_kept_gives_way_the_oldest_first() -> None:
    engine = DummyEngine(sequences=2)
    scheduler = Scheduler(engine)
    run(scheduler, request([1] * 8), request([2] * 8))
    run(scheduler, request([1] * 8))  # so that the second is the oldest
    run(scheduler, request([3] * 8))
    assert [int(kept.tokens[0]) for kept in scheduler._kept._kept] == [1, 3]
    score = LogitsScore(np.array([1, 2, 3], np.int32), 300)
    scheduler.add(score)
    while scheduler.has_work:
        scheduler.step()
    assert score.finished and score.error is None and len(scheduler._kept) == 1


def test_a_conversation_does_not_take_what_is_another_s() -> None:
    engine = DummyEngine(max_seq_len=64)
    scheduler = Scheduler(engine)
    run(scheduler, request([7, 7, *range(20)]))
    (other,) = run(scheduler, request([7, 7, 50, 51]))
    assert other.completion.cached_tokens == 0 and len(scheduler._kept) == 2


def test_a_state_that_cannot_be_rewound_is_continued_only_where_it_is() -> None:
    kept = KeptSequences(rewindable=False)
    kept.put(Kept(0, np.array([1, 2, 3], np.int32), 2))
    assert kept.find(np.array([1, 2, 3], np.int32)) is None
    assert kept.find(np.array([1, 2, 4, 5], np.int32)) is None
    assert kept.find(np.array([1, 2, 3, 4], np.int32)) == (kept._kept[0], 3)


@pytest.mark.parametrize(("repeatable", "left"), [(True, 1), (False, 0)])
def test_a_step_that_was_cut_leaves_what_can_be_rewound(repeatable: bool, left: int) -> None:
    calls = []

    def fail(batch) -> None:
        calls.append(batch)
        if len(calls) == 3:
            raise StepCancelled("cut")

    engine = DummyEngine(fail=fail, repeatable=repeatable)
    scheduler = Scheduler(engine)
    run(scheduler, request([1, 2, 3, 4, 5]))
    assert len(scheduler._kept) == left == len(engine.sequences)
    (entry,) = run(scheduler, request([1, 2, 3, 4, 5]))
    assert entry.completion.token_ids == reference_tokens([1, 2, 3, 4, 5], 4)


def test_a_request_that_failed_leaves_nothing() -> None:
    def fail(batch) -> None:
        raise KernelError("broken")

    engine = DummyEngine(fail=fail)
    run(scheduler := Scheduler(engine), request([1, 2, 3]))
    assert len(scheduler._kept) == 0 and engine.sequences == {}


def test_a_cancelled_request_leaves_what_it_has_computed() -> None:
    engine = DummyEngine()
    scheduler = Scheduler(engine)
    entry = request([1, 2, 3], 20)
    scheduler.add(entry)
    scheduler.step()
    scheduler.step()
    scheduler.cancel(entry)
    (again,) = run(scheduler, request([1, 2, 3, *entry.completion.token_ids, 5]))
    assert again.completion.cached_tokens == 4


def test_routes_that_are_recorded_are_computed() -> None:
    engine = DummyEngine()
    engine.routes = SimpleNamespace(matter=True)
    scheduler = Scheduler(engine)
    run(scheduler, request([1, 2, 3]))
    (entry,) = run(scheduler, request([1, 2, 3, 4]))
    assert entry.completion.cached_tokens == 0


CASES = {
    "mixtral": ("mixtral", {}),
    "window and sinks": ("gpt_oss", {}),
    "keys and values in int8": ("mixtral", {"kv_format": "int8"}),
    "keys and values in fp8": ("qwen3", {"kv_format": "fp8"}),
    "recurrent": ("lfm2", {}),
    "recurrent, gated delta rule": ("qwen3_next", {}),
    "recurrent, state spaces": ("granitemoehybrid", {}),
    "recurrent, Kimi Delta Attention": ("kimi_linear", {}),
    "compressed tokens": ("deepseek_v4", {}),
    "expert cache": ("mixtral", {"device": "simulated"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_has_the_bits_of_one_that_is_computed_anew(tmp_path, case: str) -> None:
    family, choices = CASES[case]
    random = np.random.default_rng(5)
    path = write_checkpoint(tmp_path / "model", family)
    with open_engine(path, tmp_path / "cache", max_seq_len=256, **choices) as engine:
        kept, fresh = Scheduler(engine), Scheduler(engine)
        text: list[int] = []
        for turn in range(4):
            text += random.integers(0, 131, (40, 1, 7, 30)[turn]).tolist()
            answers = []
            for scheduler, keep in ((kept, True), (fresh, False)):
                entry = request(text, 12, keep, ignore_eos=True, logprobs=131)
                if not keep:  # it knows nothing of the other's sequence
                    fresh._admission._free = lambda length: 3
                scheduler.add(entry)
                while scheduler.has_work:
                    scheduler.step()
                assert entry.error is None
                answers.append(entry.completion)
            assert answers[0].token_ids == answers[1].token_ids and answers[0].logprobs == answers[1].logprobs
            assert bool(answers[0].cached_tokens) == bool(turn) and not answers[1].cached_tokens
            text += answers[0].token_ids
            if turn == 1 and engine.plan.kv.repeatable:  # the last answer is taken back
                text = text[:-15]
        kept.forget()
