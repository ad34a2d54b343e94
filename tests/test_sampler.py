"""Sampling: every filter against a naive reference and transformers; promises about seeds and ties."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from oracle import recorded

from hybrid.core import SamplingParams
from hybrid.errors import KernelError, RequestError
from hybrid.serving.params import check_params
from hybrid.serving.sampler import Sampler, token_logprob
from hybrid.settings import settings_of

PROMPT = np.array([3, 5, 5, 9], np.int32)


def random_logits(seed: int, vocab: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)


def naive_probabilities(logits: np.ndarray, params: SamplingParams, output: list[int]) -> np.ndarray:
    """What the parameters mean, one sort at a time, in double precision."""
    scores = logits.astype(np.float64)
    for token in {*PROMPT.tolist(), *output}:
        penalty = params.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token in set(output):
        scores[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    weights = np.exp((scores - scores.max()) / params.temperature)
    if params.top_k:
        weights[weights < np.sort(weights)[-params.top_k :][0]] = 0
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= params.top_p * weights.sum()]] = 0
    weights[weights < params.min_p * weights.max()] = 0
    return weights / weights.sum()


def drawn(logits: np.ndarray, params: SamplingParams, draws: int = 3000) -> np.ndarray:
    """Frequencies of the tokens that fresh samplers choose first."""
    tokens = [Sampler(replace(params, seed=seed), PROMPT, len(logits)).choose(logits)[0] for seed in range(draws)]
    return np.bincount(tokens, minlength=len(logits)) / draws


FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.7, "top_p": 0.8},
    {"temperature": 2.5, "top_p": 0.97},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_draws_follow_the_naive_distribution(fields: dict) -> None:
    params = SamplingParams(**{"temperature": 1.0, **fields})
    logits = random_logits(1)
    expected = naive_probabilities(logits, params, [])
    frequencies = drawn(logits, params)
    assert not np.any(frequencies[expected == 0])
    assert np.abs(frequencies - expected).sum() < 0.05 + 2 * np.sqrt(expected / 3000).sum()


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_filters_keep_what_transformers_keeps(fields: dict) -> None:
    params = SamplingParams(**{"temperature": 1.0, **fields})
    for seed in range(5):
        logits = random_logits(seed)
        made_of = [fields, PROMPT.tolist(), logits.tolist()]
        expected = recorded("filters", made_of, lambda: by_transformers(logits, params))  # noqa: B023
        np.testing.assert_allclose(naive_probabilities(logits, params, []), expected, atol=1e-5)


def by_transformers(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    import torch
    from transformers.generation import logits_process as reference

    processors = [reference.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    processors.append(reference.TemperatureLogitsWarper(params.temperature))
    processors += [reference.TopKLogitsWarper(params.top_k)] if params.top_k else []
    processors.append(reference.TopPLogitsWarper(params.top_p))
    processors.append(reference.MinPLogitsWarper(params.min_p))
    scores = torch.from_numpy(logits)[None].clone()
    for processor in processors:
        scores = processor(torch.from_numpy(PROMPT.astype(np.int64))[None], scores)
    return torch.softmax(scores, -1)[0].numpy()


def test_penalties_count_prompt_and_output_as_documented() -> None:
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.9)
    logits, output = random_logits(4), []
    sampler = Sampler(params, PROMPT, len(logits))
    for _ in range(60):
        expected = int(naive_probabilities(logits, replace(params, temperature=1.0), output).argmax())
        token, _ = sampler.choose(logits)
        assert token == expected
        output.append(token)
    assert len(set(output)) < len(output)  # some token came twice, so its count mattered


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = np.zeros(10, np.float32)
    logits[[4, 7]] = 2
    assert Sampler(SamplingParams(), PROMPT, 10).choose(logits)[0] == 4


def test_choosing_leaves_the_logits_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.copy()
    Sampler(SamplingParams(temperature=0.7, repetition_penalty=1.5, top_p=0.5), PROMPT, 1000).choose(logits)
    np.testing.assert_array_equal(logits, before)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = random_logits(3)

    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), PROMPT, 1000)
        return [sampler.choose(logits)[0] for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-8])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(5)
    token, _ = Sampler(SamplingParams(temperature=temperature, top_p=0.9), PROMPT, 1000).choose(logits)
    assert token == logits.argmax()


def test_flat_logits_reach_every_token_with_every_filter_on() -> None:
    logits = np.zeros(600, np.float32)
    tokens = {
        Sampler(SamplingParams(temperature=1.0, top_k=10, min_p=0.5, seed=s), PROMPT, 600).choose(logits)[0]
        for s in range(12000)
    }
    assert tokens == set(range(600))  # they all tie, so top_k and min_p keep them all


def test_top_p_takes_the_first_of_equal_tokens_and_always_one() -> None:
    def reached(logits: np.ndarray, top_p: float) -> set[int]:
        params = SamplingParams(temperature=1.0, top_p=top_p)
        return {Sampler(replace(params, seed=s), PROMPT, len(logits)).choose(logits)[0] for s in range(300)}

    assert reached(np.zeros(10, np.float32), 0.5) == set(range(5))
    assert reached(np.array([0, 3, 0, 3, 0, 0, 0, 0, 0, 0], np.float32), 0.87) == {0, 1, 2, 3}
    assert reached(np.zeros(10, np.float32), 1e-9) == {0}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(value: float, temperature: float) -> None:
    logits = random_logits(6)
    logits[400] = value
    with pytest.raises(KernelError, match="token 400"):
        Sampler(SamplingParams(temperature=temperature), PROMPT, 1000).choose(logits)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(7)
    params = SamplingParams(logprobs=4, temperature=0.3, repetition_penalty=1.9, seed=1)
    token, report = Sampler(params, PROMPT, 1000).choose(logits)
    expected = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    assert report is not None and report.token_id == token
    assert report.logprob == pytest.approx(expected[token], abs=1e-5)
    assert [i for i, _ in report.top] == np.argsort(-logits)[:4].tolist()
    assert [p for _, p in report.top] == pytest.approx(np.sort(expected)[::-1][:4].tolist(), abs=1e-5)


def test_logprobs_beyond_the_vocabulary_report_the_whole_of_it() -> None:
    report = token_logprob(np.zeros(3, np.float32), 1, 50)
    assert [i for i, _ in report.top] == [0, 1, 2]
    assert token_logprob(np.zeros(3, np.float32), 1, 0).top == ()


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "max_tokens": (-1, 1.5, "many", True, Decimal(3), -(10**5000), np.float32(3), np.True_),
        "temperature": (-0.1, float("nan"), float("inf"), "warm", 10**5000, Decimal("0.5"), True, 1j, np.ones(2)),
        "top_p": (0, 1.01, float("nan")),
        "top_k": (-1, 2.0),
        "min_p": (-0.1, 1.1, float("nan")),
        "repetition_penalty": (0, -1, float("nan"), float("inf"), 1e-39, 1e-50, np.float32(1e-30), Fraction(1, 10**9)),
        "presence_penalty": (-2.1, 2.1, float("nan")),
        "frequency_penalty": (-2.1, 2.1, float("nan")),
        "seed": (-1, 0.5),
        "stop": (b"word", "", ("",), (1,), None, {"a"}),
        "stop_token_ids": ((-1,), ("1",), (1.0,), (True,), 3, None, (2**31,), (10**5000,)),
        "min_tokens": (-1, 1.0, True, None),
        "logit_bias": ({"a": 1}, {1: "a"}, {1: float("nan")}, {-1: 0}, {1: float("inf")}, [1], None, {1: 10**400}),
        "n": (0, 1.0, 10**9),
        "logits_processor": (5, "x"),
        "ignore_eos": (1, None),
        "logprobs": (-1, 1.0, True),
    }.items(),
)
def test_values_out_of_range_are_named(field: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"{field} is .*must be") as error:
            check_params(replace(SamplingParams(), **{field: value}))
        assert "\n" not in str(error.value)


def test_numbers_of_every_kind_become_plain() -> None:
    plain = check_params(
        SamplingParams(
            max_tokens=np.int64(5), temperature=Fraction(1, 2), top_p=np.float16(0.5), top_k=10**5000,
            min_p=np.float32(1), seed=np.uint64(2**63), stop="word", ignore_eos=np.True_, stop_token_ids=np.array([3]),
            logit_bias={np.int32(4): np.float32(1.5)},
        )  # type: ignore[arg-type]
    )  # fmt: skip
    assert plain == SamplingParams(
        5,
        0.5,
        0.5,
        10**5000,
        1.0,
        seed=2**63,
        stop=("word",),
        ignore_eos=True,
        stop_token_ids=(3,),
        logit_bias={4: 1.5},
    )
    for setting in settings_of(SamplingParams):
        assert type(setting.of(plain)) in (int, float, bool, tuple, dict, type(None))


EXTREMES = {
    "temperature": (0, 5e-324, 1e-45, 1e-38, 1e-30, 99.9, 100),
    "top_p": (5e-324, 1e-300, 1e-45, 1 - 1e-16, 1),
    "top_k": (0, 1, 10**5000),
    "min_p": (0, 5e-324, 1e-45, 1 - 1e-16, 1),
    "repetition_penalty": (0.01, 1 - 1e-16, 100),
    "presence_penalty": (-2, 5e-324, 2),
    "frequency_penalty": (-2, 5e-324, 2),
    "logit_bias": ({3: 1e6}, {3: -1e6}, {3: 5e-324}),
}


@pytest.mark.parametrize("scale", [1e-45, 1.0, 3e38])
@pytest.mark.parametrize(("field", "value"), [(f, value) for f in EXTREMES for value in EXTREMES[f]], ids=lambda x: "")
@pytest.mark.filterwarnings("error")
def test_no_allowed_value_blames_the_weights(field: str, value: Any, scale: float) -> None:
    logits = (np.linspace(-1, 1, 9) * scale).astype(np.float32)
    for temperature in (0.0, 1.0):
        params = check_params(replace(SamplingParams(temperature=temperature, seed=1), **{field: value}))
        sampler = Sampler(params, np.array([0, 3, 8]), 9)
        for _ in range(4):
            token, _ = sampler.choose(logits)
            assert 0 <= token < 9


def test_a_bias_moves_a_token_and_a_token_that_is_not_there_is_refused() -> None:
    logits = np.arange(8, dtype=np.float32)
    assert Sampler(SamplingParams(logit_bias={2: 100.0}), PROMPT[:0], 8).choose(logits)[0] == 2
    assert Sampler(SamplingParams(logit_bias={7: -100.0}), PROMPT[:0], 8).choose(logits)[0] == 6
    with pytest.raises(RequestError, match="logit_bias has token 8, which this model lacks; allowed: 0 to 7"):
        Sampler(SamplingParams(logit_bias={8: 1.0}), PROMPT[:0], 8)


def test_no_token_ends_the_text_before_its_time() -> None:
    logits = np.arange(8, dtype=np.float32)
    sampler = Sampler(SamplingParams(min_tokens=2), PROMPT[:0], 8, ends=[7, 6, 99])
    assert [sampler.choose(logits)[0] for _ in range(3)] == [5, 5, 7]
    with pytest.raises(RequestError, match="every one of them ends"):
        Sampler(SamplingParams(min_tokens=2), PROMPT[:0], 8, ends=range(8)).choose(logits)
    with pytest.raises(RequestError, match="min_tokens is 3, which is more than max_tokens, 2"):
        check_params(SamplingParams(min_tokens=3, max_tokens=2))


def test_a_processor_sees_all_tokens_and_makes_the_logits() -> None:
    def only_two(tokens: np.ndarray, scores: np.ndarray) -> None:
        seen.append(tokens.tolist())
        scores[:2], scores[3:] = -np.inf, -np.inf

    seen: list[list[int]] = []
    logits = np.arange(8, dtype=np.float32)
    sampler = Sampler(SamplingParams(logits_processor=only_two, temperature=1.0), PROMPT[:0], 8)
    assert sampler.choose(logits, np.array([4, 5], np.int32))[0] == 2 and seen == [[4, 5]]
    assert logits.tolist() == list(range(8))
    returned = SamplingParams(logits_processor=lambda tokens, scores: list(-scores))
    assert Sampler(returned, PROMPT[:0], 8).choose(logits)[0] == 0
    for bad in (5, "x", [1.0], np.full(8, np.nan), np.full(8, np.inf), np.full(8, -np.inf)):
        with pytest.raises(RequestError, match="logits_processor made .* 8 logits"):
            Sampler(SamplingParams(logits_processor=lambda *_, bad=bad: bad), PROMPT[:0], 8).choose(logits)


def test_samples_of_one_seed_differ_and_the_first_is_that_of_no_number() -> None:
    params, logits = SamplingParams(temperature=1.0, seed=4), np.zeros(1000, np.float32)
    first = [Sampler(params, PROMPT, 1000, sample=sample).choose(logits)[0] for sample in (0, 1, 2)]
    assert len(set(first)) == 3 and first[0] == Sampler(params, PROMPT, 1000).choose(logits)[0]


def test_every_field_is_checked_and_every_default_passes() -> None:
    check_params(SamplingParams())
    check_params(SamplingParams(max_tokens=0, seed=2**70, stop=["a"], logprobs=0, top_p=1, min_p=1))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="SamplingParams"):
        check_params({"max_tokens": 3})  # type: ignore[arg-type]
