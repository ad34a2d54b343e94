"""A rope whose frequencies depend on the length of a sequence: the same tokens however a prompt is run, and those of
transformers, where a text grows beyond the original context too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from checkpoints import write_checkpoint
from configs import CONFIGS
from oracle import Oracle
from steps import in_chunks, open_engine, step

from hybrid import LLM, SamplingParams
from hybrid.core import Batch
from hybrid.errors import ConfigError
from hybrid.models import model_spec
from hybrid.serving.request import Request
from hybrid.serving.scheduler import Scheduler

ORIGINAL = 64
SHARP = {"initializer_range": 0.1}
NEAR = 0.05  # of two logits, whose spread is 1.3
COUNT = 16
FAMILIES = ("phimoe",)
GREEDY = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    changes = {**SHARP, "router_jitter_noise": 0.0, "num_local_experts": 2} if request.param == "phimoe" else SHARP
    return oracle.save(tmp_path_factory.mktemp("long") / "hf", request.param, seed=0, **changes)


@pytest.fixture
def opened(saved: Oracle) -> Iterator[Any]:
    llms: list[LLM] = []

    def open_one(**choices: Any) -> LLM:
        choices = {"threads": 2, "max_batch": 4, "batch_invariant": True, **choices}
        llms.append(LLM(saved.path, cache_dir=saved.path.parent / "cache", **choices))
        return llms[-1]

    yield open_one
    for llm in llms:
        llm.close()


def continued(saved: Oracle, prompt: list[int], count: int) -> list[int]:
    """By transformers, greedily, as far as the two most likely tokens are apart."""

    def compute() -> dict[str, list[Any]]:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(saved.path, dtype=torch.float32, attn_implementation="eager")
        oracle.choose_by_length(model.eval())
        with torch.no_grad():
            made = model.generate(
                torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        best = [torch.topk(logits[0], 2).values for logits in made.logits]
        gaps = [float(first - second) for first, second in best]
        return {"tokens": made.sequences[0, len(prompt) :].tolist(), "gaps": gaps}

    made_of = ["greedy", oracle.contents(saved.path), prompt, count]
    group = json.loads((saved.path / "config.json").read_text())["model_type"]
    found = oracle.recorded_json(group, made_of, compute)
    apart = next((place for place, gap in enumerate(found["gaps"]) if gap < NEAR), count)
    return list(found["tokens"][:apart])


@pytest.mark.parametrize("length", [ORIGINAL - 12, ORIGINAL - 4, ORIGINAL - 1, ORIGINAL + 1])
def test_a_text_that_grows_beyond_the_original_context_is_that_of_transformers(saved, opened, length) -> None:
    prompt = saved.tokens[:length].tolist()
    wanted = continued(saved, prompt, COUNT)
    assert length + len(wanted) > ORIGINAL + 1 and len(set(wanted)) > 1
    for choices in ({}, {"chunk_size": 16}):
        (answer,) = opened(**choices).generate([prompt], GREEDY)
        assert answer.token_ids[: len(wanted)] == wanted


def test_logits_of_a_long_prompt_are_the_same_bits_in_chunks_and_beside_others(saved, opened) -> None:
    tokens = saved.tokens.tolist()
    assert len(tokens) > ORIGINAL
    whole = opened().logits(tokens)
    assert np.array_equal(whole, opened(chunk_size=16).logits(tokens))
    prompts = [tokens[:70], tokens[:20], tokens[:62], tokens[5:70]]
    alone = [opened().generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    for choices in ({}, {"chunk_size": 16}, {"chunk_size": 16, "threads": 1}):
        together = opened(**choices).generate(prompts, GREEDY)
        assert [answer.token_ids for answer in together] == alone


def test_phi3_goes_on_beyond_the_original_context_as_with_the_whole_text(tmp_path) -> None:
    """Whose logits `test_engine` compares with those of transformers."""
    path = write_checkpoint(tmp_path / "hf", "phi3")
    prompt = np.random.default_rng(1).integers(0, 131, ORIGINAL - 4).tolist()
    with LLM(path, cache_dir=tmp_path / "cache", threads=2, batch_invariant=True) as llm:
        (answer,) = llm.generate([prompt], GREEDY)
        best = llm.logits([*prompt, *answer.token_ids]).argmax(axis=-1)
    assert list(answer.token_ids)[5:] == best[ORIGINAL:-1].tolist()


def test_a_device_computes_the_same_text(saved, opened) -> None:
    pytest.importorskip("torch")
    prompt = saved.tokens[: ORIGINAL - 12].tolist()
    wanted = continued(saved, prompt, COUNT)
    for choices in ({}, {"chunk_size": 16}):
        (answer,) = opened(step_on="torch-cpu", **choices).generate([prompt], GREEDY)
        assert answer.token_ids[: len(wanted)] == wanted


def test_what_was_kept_for_a_short_text_is_not_taken_for_a_long_one(saved, opened) -> None:
    tokens, one = saved.tokens, SamplingParams(max_tokens=1, temperature=0.0)
    lengths = (60, 70, 50, 69)
    wanted = [answer.token_ids for answer in opened().generate([tokens[:length] for length in lengths], one)]
    with open_engine(saved.path, saved.path.parent / "cache") as engine:
        scheduler, kept = Scheduler(engine), [Request(tokens[:length], one, keep=True) for length in lengths]
        for request in kept:
            scheduler.add(request)
            while not request.finished:
                scheduler.step()
    assert [request.completion.token_ids for request in kept] == wanted
    assert [request.completion.cached_tokens for request in kept] == [0, 0, 49, 68]


def test_an_engine_takes_lengths_or_those_that_its_rows_tell(saved, tmp_path) -> None:
    tokens = saved.tokens
    with open_engine(saved.path, tmp_path / "cache") as engine:
        whole, rows = step(engine, (0, 0, tokens)), np.arange(30, dtype=np.int32)
        lengths = np.full_like(rows, len(tokens))
        begun = engine.forward(Batch(tokens[:30], 0 * rows + 1, rows, rows, lengths)).logits
        assert np.array_equal(begun, whole[:30])
        assert not np.array_equal(in_chunks(engine, tokens[:30], 30, slot=2), whole[:30])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_factor": [1.0] * 11}, "short_factor has 11 numbers and 24 dimensions of a head turn; it must have 12"),
        ({"long_factor": [1.0] * 11 + [0]}, "long_factor is .* a list of numbers above 0"),
        ({"long_factor": None}, "long_factor is missing"),
        ({"long_mscale": None}, "long_mscale is missing"),
        ({"rope_type": "yarn"}, "rope_type is 'yarn'; it must be one of the supported default, longrope"),
    ],
    ids=str,
)
def test_a_rope_that_contradicts_itself_is_refused(change, message) -> None:
    config = CONFIGS["phimoe"]
    with pytest.raises(ConfigError, match=message):
        model_spec({**config, "rope_scaling": {**config["rope_scaling"], **change}})


def test_a_family_with_one_set_of_frequencies_is_as_it_was(tmp_path) -> None:
    assert model_spec(CONFIGS["qwen3_moe"]).length_limits == ()
    assert model_spec(CONFIGS["phimoe"]).length_limits == (ORIGINAL,)
