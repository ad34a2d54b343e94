"""Guessed tokens: where they come from, when they are made, and that what is chosen stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from configs import CONFIGS
from dummy_engine import DummyEngine, reference_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.core import Completion, Grammar, SamplingParams
from hybrid.models import model_spec
from hybrid.plan.kv_layout import lay_out_kv
from hybrid.serving import speculation
from hybrid.serving.guesses import NGRAM, Guesses, PromptLookup
from hybrid.serving.llm import LLM
from hybrid.serving.request import Request
from hybrid.serving.scheduler import Scheduler, StepRecord
from hybrid.serving.speculation import worth_guessing
from hybrid.serving.step_seconds import StepSeconds
from hybrid.text.openings import Openings

pytestmark = pytest.mark.by_clock


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_the_guess_is_what_followed_the_last_time() -> None:
    lookup = PromptLookup()
    assert lookup.draft(tokens(1, 2, 3, 4, 5, 9, 1, 2, 3), 3) == [4, 5, 9]
    assert lookup.draft(tokens(1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 1, 2, 3), 3) == [7, 8, 1]
    assert lookup.draft(tokens(1, 2, 3, 4, 5, 9, 1, 2, 3, 7, 8, 1, 2, 3, 6), 3) == []


def test_what_repeats_itself_is_guessed_beyond_its_end() -> None:
    assert PromptLookup().draft(tokens(5, 1, 2, 1, 2, 1), 5) == [2, 1, 2, 1, 2]
    assert PromptLookup().draft(tokens(7, 7, 7, 7), 3) == [7, 7, 7]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 39), st.integers(1, 8))
def test_a_text_that_grows_is_looked_through_as_one_that_is_whole(text: list[int], cut: int, count: int) -> None:
    growing = PromptLookup()
    growing.draft(tokens(*text[:cut]), count)
    drafted = growing.draft(tokens(*text), count)
    assert drafted == PromptLookup().draft(tokens(*text), count)
    places = [i for i in range(NGRAM, len(text)) if text[i - NGRAM : i] == text[-NGRAM:]]
    assert bool(drafted) == bool(places)
    if places:
        assert (text + drafted)[places[-1] :][:count] == drafted


def taught(seconds_of, rows=(1, 2, 3, 5, 9, 17, 33)) -> StepSeconds:
    seconds = StepSeconds(float)
    for count in rows:
        for _ in range(30):
            seconds.tell(count, seconds_of(count))
    return seconds


def guesses(*told: tuple[int, int]) -> Guesses:
    made = Guesses(PromptLookup())
    for guessed, true in told:
        made.tell(guessed, true)
    return made


@pytest.mark.parametrize(
    ("seconds_of", "told", "expected"),
    [
        (lambda rows: 1.0, [(8, 8)] * 9, 32),  # more rows cost nothing
        (lambda rows: float(rows), [(8, 8)] * 9, 0),  # each row costs as much as the first
        (lambda rows: 1 + 0.1 * rows, [(8, 0)] * 9, 0),  # guesses do not come true
        (lambda rows: 1 + 0.2 * rows, [(8, 4)] * 9, 4),
    ],
)
def test_as_many_are_guessed_as_pay(seconds_of, told, expected: int) -> None:
    assert worth_guessing(taught(seconds_of), [(guesses(*told), 32)], 1, 100) == expected


def test_no_more_are_guessed_than_a_step_has_room_for() -> None:
    sure = guesses(*[(8, 8)] * 9)
    assert worth_guessing(taught(lambda rows: 1.0), [(sure, 32)], 1, 7) == 4
    assert worth_guessing(taught(lambda rows: 1.0), [(sure, 32)] * 3, 3, 7) == 2
    assert worth_guessing(taught(lambda rows: 1.0), [(sure, 32)], 1, 0) == 0


def test_requests_share_the_decision() -> None:
    """Rows of one whose guesses come true must not be paid for by rows of another whose guesses do not."""
    seconds = taught(lambda rows: 1 + 0.3 * rows)
    sure, wrong = guesses(*[(8, 8)] * 9), guesses(*[(8, 0)] * 9)
    assert worth_guessing(seconds, [(sure, 32)], 2, 100) > worth_guessing(seconds, [(sure, 32), (wrong, 32)], 2, 100)


def test_rests_grow_while_nothing_comes_true_and_end_with_the_first_that_does() -> None:
    made = Guesses(PromptLookup())
    text = tokens(1, 2, 3, 4, 1, 2, 3)
    rests = []
    for _ in range(9):
        made.tell(2, 0)
        rest = 0
        while not made.draft(text, 1):
            rest += 1
        rests.append(rest)
    assert rests == [4, 8, 16, 32, 64, 128, 256, 256, 256]
    made.tell(2, 1)
    assert made.draft(text, 1) == [4]


def test_times_between_measurements_grow_as_the_work() -> None:
    seconds = StepSeconds(lambda rows: 10.0 + rows)
    seconds.tell(1, 22.0)
    assert seconds.expected(1) == pytest.approx(22.0) and seconds.expected(10) == pytest.approx(40.0)
    for _ in range(50):
        seconds.tell(10, 60.0)
    assert seconds.expected(10) == pytest.approx(60.0) and seconds.expected(1) == pytest.approx(22.0)


class Script:
    """Guesses what `tokens` say, which may be wrong."""

    def __init__(self, prompt: list[int], following: list[int]) -> None:
        self._all = prompt + following

    def draft(self, tokens: np.ndarray, count: int) -> list[int]:
        return self._all[len(tokens) : len(tokens) + count]


class Always(Guesses):
    """Never rests."""

    def draft(self, tokens: np.ndarray, count: int) -> list[int]:
        return self.drafter.draft(tokens, count)


@pytest.fixture
def always(monkeypatch) -> None:
    """As many guesses as fit, whether they pay or not."""
    monkeypatch.setattr(speculation, "worth_guessing", lambda seconds, drafts, rows, room: room // max(1, len(drafts)))
    monkeypatch.setattr(StepSeconds, "known", True)
    monkeypatch.setattr("hybrid.serving.request.Guesses", Always)


def run(engine: DummyEngine, requests: list[Request]) -> list[StepRecord]:
    records: list[StepRecord] = []
    scheduler = Scheduler(engine)
    scheduler.on_step = records.append
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    assert scheduler.observer_error is None
    return records


def request(prompt: list[int], count: int, wrong: set[int] = frozenset(), eos: frozenset[int] = frozenset()) -> Request:
    """Whose guesses are what comes, but for those at the places `wrong`."""
    made = Request(np.array(prompt, np.int32), SamplingParams(max_tokens=count), eos)
    following = [(t + (i in wrong)) % 300 for i, t in enumerate(reference_tokens(prompt, count + 9))]
    made.guesses.drafter = Script(prompt, following)
    return made


@settings(max_examples=60)
@given(
    prompts=st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=20), min_size=1, max_size=6),
    counts=st.lists(st.integers(1, 20), min_size=6, max_size=6),
    wrong=st.lists(st.sets(st.integers(0, 20)), min_size=6, max_size=6),
    max_rows=st.integers(4, 20),
    repeatable=st.booleans(),
)
def test_tokens_are_those_without_guesses(prompts, counts, wrong, max_rows, repeatable) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "worth_guessing", lambda seconds, drafts, rows, room: room // max(1, len(drafts)))
        patch.setattr(StepSeconds, "known", True)
        patch.setattr("hybrid.serving.request.Guesses", Always)
        requests = [request(*some) for some in zip(prompts, counts, wrong, strict=False)]
        engine = DummyEngine(max_rows=max_rows, repeatable=repeatable)
        records = run(engine, requests)
    for made, prompt, count in zip(requests, prompts, counts, strict=False):
        assert made.completion.token_ids == reference_tokens(prompt, count)
        assert sum((delta.token_ids for delta in made.deltas), ()) == tuple(made.completion.token_ids)
    assert engine.sequences == {}
    assert sum(record.sampled for record in records) == sum(len(made.completion.token_ids) for made in requests)
    assert sum(record.prompt_rows for record in records) == sum(map(len, prompts))
    rows = sum(len(batch.token_ids) for batch in engine.steps)
    assert rows == sum(r.prompt_rows + r.decode_rows + r.guessed - r.right for r in records)


def test_right_guesses_save_steps_and_wrong_ones_cost_none(always) -> None:
    right, wrong = request([1, 2, 3], 15), request([1, 2, 3], 15, set(range(15)))
    records = run(DummyEngine(), [right])
    assert [record.sampled for record in records] == [1, 8, 6] and records[1].right == 7
    assert len(run(DummyEngine(), [wrong])) == 15


def test_a_guess_that_ends_the_text_ends_it(always) -> None:
    tokens_after = reference_tokens([1, 2, 3], 9)
    made = request([1, 2, 3], 9, eos=frozenset([tokens_after[4]]))
    run(DummyEngine(), [made])
    assert made.completion.token_ids == tokens_after[:5] and made.completion.finish_reason == "stop"


@pytest.mark.parametrize("repeatable", [True, False])
def test_what_is_kept_counts_the_guesses_behind_its_end(always, repeatable: bool) -> None:
    """They lie in its memory until others are written over them."""
    engine = DummyEngine(repeatable=repeatable, max_rows=30)
    made = request([1, 2, 3], 20, eos=frozenset([reference_tokens([1, 2, 3], 20)[2]]))
    made.keep = True
    scheduler = Scheduler(engine)
    scheduler.add(made)
    while scheduler.has_work:
        scheduler.step()
    (held,) = map(len, engine.sequences.values())
    assert scheduler.kept_lengths == [made.computed] and made.computed < held <= scheduler._kept.tokens
    scheduler.forget()


ARRIVALS = st.tuples(
    st.integers(0, 1),  # which text the prompt is of
    st.integers(1, 40),  # how much of it
    st.integers(1, 60),  # tokens to produce
    st.sets(st.integers(0, 60), max_size=20),  # guesses that are wrong
    st.integers(-1, 1),  # priority
    st.booleans(),  # whether it keeps
    st.sampled_from([None, *range(5)]),  # the token that opens a call
    st.integers(0, 9),  # steps until the next one arrives
    st.booleans(),  # whether it is cancelled then
)


@settings(max_examples=60)
@given(st.lists(ARRIVALS, max_size=8), st.integers(64, 200), st.integers(0, 120), st.integers(4, 16), st.booleans())
def test_guesses_change_nothing_whoever_gives_way_or_goes_on(
    arrivals, budget: int, pooled: int, rows: int, repeatable: bool
) -> None:
    """A recurrent state goes back within its run alone, from the pool, too; memory is had for what guesses write."""
    engine = DummyEngine(5, kv_token_budget=budget, prefix_bytes=pooled, max_rows=rows, repeatable=repeatable)
    texts, requests = [[3, 1, 4] * 14, [2, 0] * 20], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "worth_guessing", lambda seconds, drafts, rows, room: room // max(1, len(drafts)))
        patch.setattr(StepSeconds, "known", True)
        patch.setattr("hybrid.serving.request.Guesses", Always)
        scheduler = Scheduler(engine)
        for text, length, count, wrong, priority, keep, call, steps, cancelled in arrivals:
            prompt, params = texts[text][:length], SamplingParams(max_tokens=count, priority=priority)
            made = Request(np.array(prompt, np.int32), params, keep=keep, openings=Openings(call=call))
            following = [(t + (i in wrong)) % 5 for i, t in enumerate(reference_tokens(prompt, 69, 5))]
            made.guesses.drafter = Script(prompt, following)
            requests.append(made)
            scheduler.add(made)
            for _ in range(steps):
                scheduler.step()
            if cancelled:
                scheduler.cancel(made)
        while scheduler.has_work:
            scheduler.step()
    for made in requests:
        produced = made.completion.token_ids
        assert made.error is None and produced == reference_tokens(made.prompt.tolist(), 69, 5)[: len(produced)]
    scheduler.forget()
    assert engine.sequences == {}


def test_guesses_end_where_a_recurrent_state_could_not_go_back(always) -> None:
    engine = DummyEngine(repeatable=False, max_rows=30)
    run(engine, [request([1, 2, 3], 20, wrong={8})])
    steps = [(int(batch.positions[0]), len(batch.token_ids)) for batch in engine.steps]
    assert steps == [(0, 3), (3, 5), (8, 8), (11, 5), (16, 6)]


def test_there_are_no_guesses_if_there_are_to_be_none(always) -> None:
    engine = DummyEngine(speculate=False)
    run(engine, [request([1, 2, 3], 9)])
    assert [len(batch.token_ids) for batch in engine.steps] == [3] + [1] * 8


def test_guesses_do_not_delay_a_prompt(always) -> None:
    short, long = request([1], 20), request(list(range(30)), 3)
    engine = DummyEngine()
    run(engine, [short, long])
    assert [len(batch.token_ids) for batch in engine.steps[:4]] == [8, 8, 8, 8]
    assert [len(batch.logit_rows) for batch in engine.steps[1:3]] == [1, 1]


LAYOUTS = {family: lay_out_kv(model_spec(config), 64, "bf16") for family, config in CONFIGS.items()}
RECURRENT = [family for family, layout in LAYOUTS.items() if not layout.repeatable]
SETTINGS = {"threads": 2, "max_seq_len": 256, "max_batch": 4, "chunk_size": 64, "batch_invariant": True}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Its bits are those of any number of rows, with AMX too."""
    with LLM(speculate=True, **SETTINGS) as opened:
        yield opened


@dataclass
class Both:
    """Answers without guesses and with them, and the steps of the latter."""

    plain: list[Completion]
    guessed: list[Completion]
    records: list[StepRecord]

    def sum(self, name: str) -> int:
        return sum(getattr(record, name) for record in self.records)


def in_both_ways(llm: LLM, prompts: list[Any], params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> Both:
    """Every fifth guess is wrong."""
    monkeypatch.setattr(speculation, "COUNTS", (0,))
    both = Both(llm.generate(prompts, params), [], [])
    monkeypatch.setattr(speculation, "COUNTS", (1, 2, 4, 8))

    def draft(_: PromptLookup, tokens: np.ndarray, count: int) -> list[int]:
        texts = [made.prompt_token_ids + made.token_ids for made in both.plain]
        text = next(text for text in texts if text[: len(tokens)] == tokens.tolist())
        following = range(len(tokens), min(len(text), len(tokens) + count))
        return [5 if place % 5 == 0 else text[place] for place in following]

    monkeypatch.setattr(PromptLookup, "draft", draft)
    llm.observe(both.records.append)
    both.guessed = llm.generate(prompts, params)
    llm.observe(None)
    for mine, its in zip(both.guessed, both.plain, strict=True):
        assert (mine.token_ids, mine.text, mine.logprobs) == (its.token_ids, its.text, its.logprobs)
        assert mine.finish_reason == its.finish_reason
    return both


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 7, "top_p": 0.9},
    "with logprobs": {"logprobs": 2},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
    "stop": {"stop": ("was",)},
    "grammar": {"grammar": Grammar.regex("( (red|blue|ball|Tom|Lily|had|a|\\.))+")},
}


@pytest.mark.parametrize("case", PARAMS)
def test_answers_of_a_model_are_those_without_guesses(llm, monkeypatch, always, case) -> None:
    if case == "grammar":
        pytest.importorskip("llguidance")
    params = SamplingParams(**{"max_tokens": 40, **PARAMS[case]})
    both = in_both_ways(llm, ["Lily had a red ball. Tom had", "Once upon a time", "One day"], params, monkeypatch)
    assert both.sum("guessed") > both.sum("right") > 10 and len(both.records) < 40


@pytest.mark.parametrize("family", RECURRENT)
def test_answers_of_a_recurrent_model_are_those_without_guesses(tmp_path, monkeypatch, always, family) -> None:
    """Prompts end at different places of a run."""
    path = write_checkpoint(tmp_path / "hf", family)
    random = np.random.default_rng(3)
    prompts = [random.integers(10, 100, count).tolist() for count in (1, 14, 23)]
    with LLM(path, cache_dir=tmp_path / "cache", speculate=True, **SETTINGS) as llm:
        both = in_both_ways(llm, prompts, SamplingParams(max_tokens=60, logprobs=2, ignore_eos=True), monkeypatch)
    assert both.sum("guessed") > both.sum("right") > 40 and len(both.records) < 60
