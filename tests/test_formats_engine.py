"""Every weight and KV format: logits are those of the dequantised weights, and the same bits however a prompt is run.

Bounds: a part of a layer may be off by 0.6 % of its output where its activations stay bf16, by 2.5 % where they are
int8. What the parts add to the residual stream is independent, so the squares add up over the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracle
import pytest
from checkpoints import mxfp4_tensors, mxfp4_values, write_tensors
from configs import CONFIGS
from dequantised import WRITTEN, write_dequantised
from oracle import Oracle
from rig import paired
from steps import greedy, in_chunks, open_engine, step

from hybrid.formats import FORMATS, GROUPED
from hybrid.formats.mix import MIXES, FormatMix
from hybrid.models import model_spec
from hybrid.models.layers.block_selected import BlockSelectedAttention
from hybrid.models.layers.gated_delta import GatedDeltaNet
from hybrid.models.spec import ModelSpec
from hybrid.weights.pack import cached_store

TEXTS = [
    # Of those left out one mix has every length and kind of scales, and one family each the other two.
    *(name for name in MIXES if name not in (*GROUPED, "fp8_row", "nvfp4")),
    "int4,attention=fp8,head=int8,dense=mxfp4",
    "mxfp4,attention=int8,dense=int4,shared=fp8",
    "q4_k,attention=q5_1,head=q6_k,dense=q4_k,shared=q8_0",
]
SHARP = {"initializer_range": 0.1}  # what layers add outweighs the embedding, so that their errors show
# As many dimensions as published models have: of few, a key is at right angles to a query by chance, so that a norm
# makes the rounding of what is found as large as what else is found. In transformers too, whose inputs are rounded.
KEYS = {"linear_key_head_dim": 124}
KIMI_KEYS = {
    "kimi_linear": {"linear_attn_config": {**CONFIGS["kimi_linear"]["linear_attn_config"], "head_dim": 124}},
    "bailing_hybrid": {"head_dim": 124},
}
FLOAT, INTEGER = 0.006, 0.025
KV_ERRORS = {"bf16": 0.0, "int8": 0.006, "fp8": 0.027}  # of a stored value; e4m3: half of 2^-3, spread evenly


def bound(spec: ModelSpec, mix: FormatMix, kv_format: str = "bf16") -> float:
    parts = [mix.head]
    for layer in spec.layers:
        parts += [format for half in layer.halves for format in half.formats(mix)]
    errors = [INTEGER if FORMATS[part].integer else FLOAT for part in parts]
    # What a half adds has its full size in every layer. The delta rule multiplies what comes from the halves before by
    # itself, as keys, queries, values and gates, and norms it: in transformers rounded inputs cost as much there. Norms
    # less 1 double queries and keys of MiniMax-M3 here: its scores, and their rounding, are four times as large.
    normed = 1.3 if getattr(spec.layers[0].mixer.names, "post_norm", "") else 1.0
    multiplied = (
        1.25 if any(isinstance(layer.mixer, GatedDeltaNet | BlockSelectedAttention) for layer in spec.layers) else 1.0
    )
    return normed * multiplied * float(np.sqrt(np.square(errors).sum() + len(spec.layers) * KV_ERRORS[kv_format] ** 2))


def all_active(family: str) -> dict[str, int]:
    """The change that makes every expert active, so that rounding cannot send a near-tie to another one."""
    config = CONFIGS[family]
    if family == "phimoe":  # where each weighs 1: the order in which they are chosen would change its weight
        return {"num_local_experts": 2, "router_jitter_noise": 0.0}
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    chosen = ("num_experts_per_tok", "moe_k", "moe_topk")
    experts = next((config[name] for name in counts if name in config), None)
    groups = {"n_group": 1} if "n_group" in config else {}
    return groups | {name: experts for name in chosen if name in config} if experts else {}


def relative_error(logits: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))


@dataclass(frozen=True)
class Reference:
    """A checkpoint, and the fp32 logits of transformers for the weights that its store in some mix stands for."""

    saved: Oracle
    cache: Path
    exact: np.ndarray


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Reference]:
    @functools.cache
    def saved(family: str) -> Oracle:
        keys = {name: size for name, size in KEYS.items() if name in CONFIGS[family]} | KIMI_KEYS.get(family, {})
        return oracle.save(tmp_path_factory.mktemp(family) / "hf", family, **SHARP, **all_active(family), **keys)

    @functools.cache
    def make(family: str, text: str) -> Reference:
        source, folder = saved(family), tmp_path_factory.mktemp("store")
        with cached_store(source.path, folder, text) as store:
            exact = oracle.logits(write_dequantised(folder / "exact", store), source.tokens)
        return Reference(source, folder, exact)

    return make


@pytest.mark.parametrize(("family", "text", "isa"), paired(WRITTEN, TEXTS))
def test_logits_are_those_of_the_dequantised_weights(reference, isa, family, text) -> None:
    """Every family in every mix, each with one instruction set: each of those meets every family and every mix.

    Every op in every format with every instruction set is for `tests/kernels`.
    """
    wanted = reference(family, text)
    with open_engine(wanted.saved.path, wanted.cache, weight_format=text, isa=isa) as engine:
        logits = step(engine, (0, 0, wanted.saved.tokens))
        allowed = bound(engine.spec, engine.plan.formats)
    error, cost = relative_error(logits, wanted.exact), relative_error(wanted.exact, wanted.saved.exact)
    print(f"{family}, {text}, {isa}: {error:.2%} of {allowed:.2%}; quantising the weights costs {cost:.2%}")
    assert 0 < error <= allowed
    assert text != "int4" or allowed < cost  # else nothing shows that these weights were used, and not the original


@pytest.mark.parametrize(("family", "text"), [("qwen2_moe", "nvfp4"), ("deepseek_v3", "fp8_row")])
def test_logits_of_formats_that_few_publish(reference, isa, family, text) -> None:
    test_logits_are_those_of_the_dequantised_weights(reference, isa, family, text)


APART = {  # the formats of the projections of attention, with rows of every kind
    "llama": "q4_k/q4_k/q6_k/q5_1",
    "qwen2_moe": "int8/bf16/q8_0/fp8",
    "gemma3_text": "q4_0/q5_0/q5_0/int4",
    "deepseek_v2": "q5_k/int4/bf16",
    "deepseek_v3": "int8/q4_k/bf16/q6_k",
}


@pytest.mark.parametrize("family", APART)
def test_projections_of_attention_may_differ(reference, isa, family) -> None:
    text = f"q4_k,attention={APART[family]}"
    wanted = reference(family, text)
    with open_engine(wanted.saved.path, wanted.cache, weight_format=text, isa=isa) as engine:
        logits, allowed = step(engine, (0, 0, wanted.saved.tokens)), bound(engine.spec, engine.plan.formats)
        again = in_chunks(engine, wanted.saved.tokens, 23)
    assert 0 < relative_error(logits, wanted.exact) <= allowed
    np.testing.assert_array_equal(again, logits)


def published_pair(folder: Path) -> tuple[Path, Path]:
    """gpt-oss as it is published, in mxfp4, and the same values in the fp32 checkpoint that transformers would save."""
    config = {**CONFIGS["gpt_oss"], "intermediate_size": 64, **all_active("gpt_oss")}
    tensors = mxfp4_tensors(model_spec(config), exponents=(120, 126))
    values = {name: value.astype(np.float32) for name, value in tensors.items() if value.dtype != np.uint8}
    for name in {name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")}:
        values[name] = np.ascontiguousarray(mxfp4_values(tensors, name).transpose(0, 2, 1))
    quantised = config | {"quantization_config": {"quant_method": "mxfp4"}}
    return (
        write_tensors(folder / "mxfp4", quantised, tensors),
        write_tensors(folder / "exact", config | {"torch_dtype": "float32"}, values),
    )


def test_a_published_gpt_oss_runs_in_its_own_format(tmp_path, isa) -> None:
    """Its experts are taken as they are, so nothing but the activations is rounded."""
    published, dequantised = published_pair(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 131, 70).astype(np.int32)
    exact = oracle.logits(dequantised, tokens)
    with open_engine(published, tmp_path / "cache", isa=isa) as engine:
        assert engine.plan.formats == MIXES["mxfp4"]
        error, allowed = relative_error(step(engine, (0, 0, tokens)), exact), bound(engine.spec, MIXES["mxfp4"])
    print(f"published gpt_oss, {isa}: {error:.2%} of {allowed:.2%}")
    assert 0 < error <= allowed


LONG = {"length": 300, "max_position_embeddings": 512}  # two key blocks


@pytest.fixture(scope="module")
def long_saved(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return oracle.save(tmp_path_factory.mktemp("kv") / "hf", "qwen3_moe", **LONG, **SHARP, **all_active("qwen3_moe"))


@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
def test_quantised_keys_and_values_stay_near_those_of_bf16(long_saved, isa, kv_format) -> None:
    """Prefill in chunks, then a decoded row."""
    logits, tokens = {}, long_saved.tokens[:291]
    for format in ("bf16", kv_format):
        with open_engine(long_saved.path, cache(long_saved), isa=isa, kv_format=format, chunk_size=58) as engine:
            logits[format] = in_chunks(engine, tokens, 58)
            allowed = bound(engine.spec, engine.plan.formats, kv_format)
    error = relative_error(logits[kv_format], logits["bf16"])
    print(f"{kv_format}, {isa}: {error:.2%} of {allowed:.2%}")
    assert 0 < error <= allowed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return oracle.save(tmp_path_factory.mktemp("formats") / "hf", "qwen3_moe", **LONG)


def cache(saved: Oracle) -> Path:
    return saved.path.parent / "cache"


PAIRS = [*((text, "bf16") for text in TEXTS), ("bf16", "int8"), ("bf16", "fp8"), ("int4", "int8"), ("fp8", "fp8")]


@pytest.mark.parametrize(("text", "kv_format"), PAIRS)
def test_logits_are_the_same_bits_on_every_path(saved, isa, text, kv_format) -> None:
    """In one step and in chunks, alone and among others, on one thread and on three."""
    choices = {"weight_format": text, "kv_format": kv_format, "isa": isa, "batch_invariant": True}
    tokens = saved.tokens[:100]
    with open_engine(saved.path, cache(saved), **choices) as engine:
        whole = step(engine, (0, 0, tokens))
        assert np.array_equal(whole[:40], in_chunks(engine, tokens[:40], 1, slot=1))
        assert np.array_equal(whole, in_chunks(engine, tokens, 7, slot=2))
        step(engine, (3, 0, tokens[:20]))
        together = step(engine, (1, 40, tokens[40:41]), (2, 0, tokens), (3, 20, tokens[5:10]))
        assert np.array_equal(whole[40], together[0]) and np.array_equal(whole, together[1:101])
    for threads in (1, 3):
        with open_engine(saved.path, cache(saved), threads=threads, **choices) as engine:
            assert np.array_equal(whole, step(engine, (0, 0, tokens)))


@pytest.mark.parametrize(("text", "kv_format"), PAIRS)
def test_greedy_tokens_are_the_same_on_every_path(saved, text, kv_format) -> None:
    """Across the end of a key block."""
    choices = {"weight_format": text, "kv_format": kv_format, "chunk_size": 256, "batch_invariant": True}
    prompt = saved.tokens[:245]
    with open_engine(saved.path, cache(saved), **choices) as engine:
        expected = greedy(engine, prompt, 245)
        assert len(set(expected)) > 1
        assert expected == greedy(engine, prompt, 33, slot=2)
    with open_engine(saved.path, cache(saved), threads=1, **choices) as engine:
        assert expected == greedy(engine, prompt, 100, slot=1)
