"""Prompts that are kept beyond the sequences: the same tokens and bits, within the memory that they may have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from dummy_engine import DummyEngine, reference_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import open_engine
from test_kept import arrive, request, run
from test_plan import plan_of
from test_prefixes import ARRIVALS, shared_with_others

from hybrid import LLM
from hybrid.errors import ConfigError
from hybrid.serving.pool import NODE_TOKENS
from hybrid.serving.request import Request
from hybrid.serving.scheduler import Scheduler
from hybrid.text.answer_format import DIALECTS
from hybrid.text.messages import ChatInput
from hybrid.text.openings import Openings, choose_openings

SYSTEM = list(range(1, 41))


def make(**plan) -> tuple[DummyEngine, Scheduler]:
    engine = DummyEngine(**{"kv_token_budget": 512, "prefix_bytes": 512, "max_seq_len": 400, "max_rows": 64} | plan)
    return engine, Scheduler(engine)


def chat(prompt: list[int], max_tokens: int = 4, keep: bool = True, **fields: Any) -> Request:
    """Token 10 opens a message, 11 a call."""
    entry = request(prompt, max_tokens, keep, **fields)
    entry.openings = Openings(10, 11)
    return entry


def test_what_gave_up_its_sequence_is_still_there() -> None:
    engine, scheduler = make(sequences=1)
    texts = [[token] * 20 for token in (1, 2, 3)]
    run(scheduler, *(request(text) for text in texts))
    entries = run(scheduler, *(request([*text, 9]) for text in texts))
    assert [entry.completion.cached_tokens for entry in entries] == [16, 16, 16]
    pool = scheduler._admission.pool
    assert (pool.report().hits, pool.report().hit_tokens) == (3, 48) and pool.report().tokens == 3 * 16
    scheduler.forget()
    assert engine.sequences == {} and (len(pool), pool.nbytes) == (0, 0)


def test_what_strangers_begin_with_is_there_once() -> None:
    _, scheduler = make(sequences=1)
    run(scheduler, *(request([*SYSTEM, *[token] * 20], 1) for token in (50, 60, 70)))
    pool = scheduler._admission.pool
    assert pool.report().tokens == 32 + 3 * 16 == pool.nbytes
    (entry,) = run(scheduler, request([*SYSTEM, *[60] * 20, 5]))
    assert entry.completion.cached_tokens == 48


def test_the_longest_unused_gives_way_leaves_first() -> None:
    _, scheduler = make(sequences=1, prefix_bytes=96)
    first, second = [*SYSTEM, *[50] * 24], [*SYSTEM, *[60] * 24]  # 32 alike, then 32
    run(scheduler, request(first, 1), request(second, 1), request(first, 1))
    pool = scheduler._admission.pool
    assert pool.nbytes == 96 and pool.report().evicted == 0
    run(scheduler, request([70] * 40, 1))
    assert pool.report().evicted == 1
    scheduler._admission._give_up_oldest()
    found = {name: pool.find(np.array([*text, 0], np.int32)).tokens for name, text in (("1", first), ("2", second))}
    assert found == {"1": 64, "2": 32}


def test_a_long_prompt_is_kept_in_several_nodes_and_its_beginning_if_there_is_no_room() -> None:
    _, scheduler = make(kv_token_budget=2000, max_seq_len=800, prefix_bytes=2000, sequences=1)
    text = np.random.default_rng(1).integers(0, 300, 700).tolist()
    run(scheduler, request(text, 1))
    pool = scheduler._admission.pool
    assert [len(node.tokens) for node in pool._used] == [700 // 16 * 16 - 2 * NODE_TOKENS, NODE_TOKENS, NODE_TOKENS]
    _, small = make(kv_token_budget=2000, max_seq_len=800, prefix_bytes=300, sequences=1)
    run(small, request(text, 1))
    assert small._admission.pool.report().tokens == NODE_TOKENS


def test_a_system_without_memory_keeps_less_and_fails_nobody() -> None:
    engine, scheduler = make(sequences=1)

    def save(sequence: int, start: int, stop: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    engine.save = save
    (entry,) = run(scheduler, request(SYSTEM))
    assert entry.error is None and len(scheduler._admission.pool) == 0


def test_a_recurrent_state_goes_on_where_it_was_saved_within_a_block_too() -> None:
    _, scheduler = make(sequences=1, repeatable=False)
    texts = [[token] * 20 for token in (1, 2, 3)]
    answers = run(scheduler, *(request(text) for text in texts))
    turns = [[*text, *answer.completion.token_ids, 9] for text, answer in zip(texts, answers, strict=True)]
    entries = run(scheduler, *(request(turn) for turn in turns[:2]))
    assert [entry.completion.cached_tokens for entry in entries] == [23, 23]
    assert [entry.completion.token_ids for entry in entries] == [reference_tokens(turn, 4) for turn in turns[:2]]
    (entry,) = run(scheduler, request([1] * 21))
    assert entry.completion.cached_tokens == 16  # where the last block of the prompt began


SYSTEM_PROMPT = [10, *range(100, 137)]


def question(*tokens: int) -> list[int]:
    return [*SYSTEM_PROMPT, 10, *tokens, 10, 1]


def test_a_recurrent_state_is_saved_before_messages_so_that_a_turn_put_anew_costs_only_itself() -> None:
    _, scheduler = make(sequences=1, repeatable=False, max_rows=16)
    prompts = [question(*[token] * 5, 7) for token in (3, 4)]
    entries = run(scheduler, *(chat(prompt) for prompt in [*prompts, prompts[1]]))
    assert [entry.completion.cached_tokens for entry in entries] == [0, len(SYSTEM_PROMPT), len(prompts[1]) - 2]
    assert entries[2].completion.token_ids == reference_tokens(prompts[1], 4)
    turns = [[*prompts[1], *reference_tokens(prompts[1], 4), 10, *said, 10, 1] for said in ([5], [6, 6])]
    _, anew = run(scheduler, *(chat(turn) for turn in turns))
    assert anew.completion.cached_tokens == len(prompts[1]) + 4
    assert anew.completion.token_ids == reference_tokens(turns[1], 4)


def test_prompts_that_arrive_together_wait_for_the_state_that_they_share() -> None:
    _, scheduler = make(repeatable=False, max_rows=16)
    entries = run(scheduler, *(chat(question(*[token] * 5), 2) for token in (3, 4, 4)))
    assert [entry.completion.cached_tokens for entry in entries] == [0, 38, 38 + 6]
    assert all(entry.completion.token_ids == reference_tokens(entry.prompt.tolist(), 2) for entry in entries)


def test_a_recurrent_state_is_saved_where_a_call_opens() -> None:
    def next_token(tokens: list[int]) -> int:
        return 11 if len(tokens) == 50 else 20 + len(tokens) % 7

    _, scheduler = make(sequences=1, repeatable=False, next_token=next_token)
    prompt = question(3, 3)
    (entry,) = run(scheduler, chat(prompt, 12))
    said = entry.completion.token_ids
    assert len(prompt) + said.index(11) == 50
    (anew,) = run(scheduler, chat([*prompt, *said[: said.index(11) + 1], 9, 9, 10, 1]))
    assert anew.completion.cached_tokens == 50


def test_a_long_text_is_saved_every_so_often() -> None:
    _, scheduler = make(kv_token_budget=2000, max_seq_len=800, prefix_bytes=2000, sequences=1, repeatable=False)
    text = np.random.default_rng(1).integers(20, 300, 700).tolist()
    run(scheduler, chat(text, 1))
    (entry,) = run(scheduler, chat([*text[:600], 3, 3], 1))
    assert entry.completion.cached_tokens == 512


@settings(max_examples=100)
@given(st.lists(ARRIVALS, max_size=12), st.integers(64, 200), st.integers(0, 120), st.integers(1, 3), st.booleans())
def test_whatever_is_kept_tokens_are_those_of_a_fresh_start(
    arrivals, budget: int, limit: int, sequences: int, repeatable: bool
) -> None:
    engine = DummyEngine(kv_token_budget=budget, prefix_bytes=limit, sequences=sequences, repeatable=repeatable)
    arrive(Scheduler(engine), [shared_with_others(chat, *arrival) for arrival in arrivals])


CASES = {
    "mixtral": ("mixtral", {}),
    "keys and values in int8": ("mixtral", {"kv_format": "int8"}),
    "window and sinks": ("gpt_oss", {"kv_format": "fp8"}),
    "latents in int8": ("deepseek_v3", {"kv_format": "int8"}),
    "longrope": ("phi3", {}),
    "short convolutions": ("lfm2", {}),
    "gated delta rule": ("qwen3_next", {}),
    "state spaces": ("granitemoehybrid", {}),
    "Kimi Delta Attention": ("bailing_hybrid", {}),
    "compressed tokens": ("deepseek_v4", {}),
    "pools of tokens in int8": ("glm5_next_text", {"kv_format": "int8"}),
    "compressed tokens in int8": ("deepseek_v4", {"kv_format": "int8"}),
    "layers of one half": ("nemotron_h", {}),
    "expert cache": ("mixtral", {"device": "simulated"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_pool_gives_has_the_bits_of_what_is_computed(tmp_path, case: str) -> None:
    family, choices = CASES[case]
    random = np.random.default_rng(7)
    text = random.integers(0, 131, 40).tolist()
    path = write_checkpoint(tmp_path / "model", family)
    with open_engine(path, tmp_path / "cache", max_seq_len=256, **choices) as engine:
        pooled, fresh = Scheduler(engine), Scheduler(engine)
        known, phase = 0, 0
        for new in (0, 33, 70):
            text += random.integers(0, 131, new).tolist()
            ours, theirs = (request(text, 9, keep, ignore_eos=True, logprobs=131) for keep in (True, False))
            run(pooled, ours)
            while pooled._admission._give_up_oldest():
                """Only the pool has it now."""
            run(fresh, theirs)
            if engine.plan.kv.repeatable:
                known -= known % 16
            same_keys = engine.spec.length_phase(len(ours.prompt)) == phase
            assert ours.completion.cached_tokens == known * same_keys
            assert ours.completion.token_ids == theirs.completion.token_ids
            assert ours.completion.logprobs == theirs.completion.logprobs
            text += ours.completion.token_ids
            known, phase = len(text) - 1, ours.phase
        pooled.forget()


def test_the_memory_for_prefixes_is_half_of_what_is_left_or_what_is_said() -> None:
    plan = plan_of()
    assert plan.prefix_bytes == plan.state_bytes // 2 > 0
    assert plan_of(prefix_memory_gb=0.0).prefix_bytes == 0
    assert plan_of(prefix_memory_gb=0.25).prefix_bytes == 250_000_000
    with pytest.raises(ConfigError, match=r"--prefix-memory-gb 9000 is more than the .* GB that weights and buffers"):
        plan_of(prefix_memory_gb=9000.0)


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next", "granitemoehybrid", "kimi_linear", "deepseek_v4"])
def test_a_turn_put_anew_has_the_bits_of_what_is_computed(tmp_path, family: str) -> None:
    random = np.random.default_rng(8)
    system, first, second = ([10, *random.integers(12, 131, count).tolist()] for count in (60, 30, 25))
    path = write_checkpoint(tmp_path / "model", family)
    with open_engine(path, tmp_path / "cache", max_seq_len=256, chunk_size=32) as engine:
        pooled, fresh = Scheduler(engine), Scheduler(engine)
        for said, known in ((first, 0), (second, len(system))):
            prompt = [*system, *said, 10, 12]
            ours, theirs = (chat(prompt, 9, keep, ignore_eos=True, logprobs=131) for keep in (True, False))
            run(pooled, ours)
            while pooled._admission._give_up_oldest():
                """Only the pool has it now."""
            run(fresh, theirs)
            assert ours.completion.cached_tokens == known and not theirs.completion.cached_tokens
            assert ours.completion.token_ids == theirs.completion.token_ids
            assert ours.completion.logprobs == theirs.completion.logprobs
        pooled.forget()


def test_what_opens_a_message_is_what_a_template_writes_most_often() -> None:
    template = "{{ '<|eot|>' }}{% for m in messages %}<|begin|>{{ m }}<|end|>{% endfor %}<|begin|>assistant <|end|>"
    specials = {"<|end|>": 1, "<|begin|>": 2, "<|eot|>": 3, " ": 4}
    hermes = DIALECTS["hermes"]
    assert choose_openings(template, specials, {**specials, "<tool_call>": 9}, hermes) == Openings(2, 9)
    assert choose_openings("<|eot|> once", specials, specials, hermes) == Openings(None, None)
    with LLM() as llm:
        request = llm.intake.chat_request(ChatInput([{"role": "user", "content": "a"}]), None)
        opening = llm.tokenizer.token_id("<|im_start|>")
        assert request.openings.message == opening and np.count_nonzero(request.prompt == opening) == 2
