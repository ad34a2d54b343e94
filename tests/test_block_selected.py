"""MiniMax-M3: in long sequences a KV head of a row attends to the blocks that its indexer selects, and to no others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from checkpoints import random_tensors, write_checkpoint, write_tensors
from configs import CONFIGS
from oracle import Oracle
from steps import errors_together, in_chunks, open_engine, step

from cpu_kernels import INDEX_BLOCK
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.formats.mix import FormatMix
from hybrid.models import model_spec
from hybrid.models.layers.base import Load
from hybrid.models.layers.block_selected import BlockSelectedAttention
from hybrid.plan.resolve import plan_model

FAMILY = "minimax_m3_vl_text"
LONG: dict[str, Any] = {
    "initializer_range": 0.1,
    "num_experts_per_tok": 8,  # of 8: no near-tie decides
    "max_position_embeddings": 1024,
    "index_topk_blocks": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "two blocks": {},
    "three blocks, a head each, keys of another size": {
        "index_topk_blocks": 3, "index_head_dim": 34, "num_key_value_heads": 3, "index_n_heads": 3,
    },
    "its own block alone": {"index_topk_blocks": 1},
}  # fmt: skip
WIDE = {"chunk_size": 512, "max_seq_len": 1024}
LENGTH = 450  # more than a key block; the last block is not full


def save(path: Path, case: str, seed: int = 0) -> Oracle:
    return oracle.save(path, FAMILY, seed=seed, length=LENGTH, **{**LONG, **CASES[case]})


@pytest.mark.parametrize("case", CASES)
def test_logits_are_nearer_to_fp32_than_transformers_in_bf16(tmp_path: Path, case: str) -> None:
    """Of rows that select, too: rounding may exchange blocks of nearly equal worth, in either."""
    saved = [save(tmp_path / f"{seed}", case, seed) for seed in range(2)]
    ours, theirs = errors_together(saved, tmp_path / "cache", **WIDE)
    assert 0 < ours <= theirs


@pytest.mark.parametrize("change", [{"index_topk_blocks": 3}, {"layer_types": None}], ids=str)
def test_a_slightly_wrong_model_is_further_off(tmp_path: Path, change: dict[str, Any]) -> None:
    saved = save(tmp_path / "hf", "two blocks")
    exact, errors = saved.exact, []
    for changes in ({}, change):
        file = saved.path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        if "layer_types" in changes:
            write_tensors(saved.path, json.loads(file.read_text()), without_indexers(saved.path))
        with open_engine(saved.path, tmp_path / f"cache{len(errors)}", **WIDE) as engine:
            errors.append(float(np.linalg.norm(in_chunks(engine, saved.tokens, 512) - exact)))
    assert errors[1] > 1.5 * errors[0]


def without_indexers(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: array for name, array in load_file(path / "model.safetensors").items() if ".index_" not in name}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return save(tmp_path_factory.mktemp("blocks") / "hf", "two blocks")


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "fp8"])
def test_logits_are_the_same_bits_however_a_prompt_is_run(saved: Oracle, kv_format: str) -> None:
    """In chunks, beside others, behind a rewind, in a copied and in a saved and loaded sequence, on any threads."""
    tokens, cache = saved.tokens, saved.path.parent / "cache"
    with open_engine(saved.path, cache, kv_format=kv_format, **WIDE) as engine:
        whole = in_chunks(engine, tokens, 512)
        for size in (7, 64, 333):
            assert np.array_equal(whole, in_chunks(engine, tokens, size, slot=1)), size
        single = [step(engine, (1, i, tokens[i : i + 1])) for i in range(400, LENGTH)]
        assert np.array_equal(whole[400:], np.concatenate(single))
        together = step(engine, (1, 430, tokens[430:431]), (2, 0, tokens[:300]), (3, 0, tokens[:20]))
        assert np.array_equal(whole[:300], together[1:301]) and np.array_equal(whole[430:431], together[:1])
        step(engine, (1, 300, tokens[::-1][:60]))
        assert np.array_equal(whole[300:], step(engine, (1, 300, tokens[300:])))
        engine.addresses.copy(0, 3, 400)
        assert np.array_equal(whole[400:], step(engine, (3, 400, tokens[400:])))
        kept = engine.addresses.kv.save(0, 0, 400)
        engine.release(1)
        engine.addresses.kv.load(kept, 1, 0, 384)
        assert np.array_equal(whole[384:], step(engine, (1, 384, tokens[384:])))
    for threads in (1, 3):
        with open_engine(saved.path, cache, kv_format=kv_format, threads=threads, **WIDE) as engine:
            assert np.array_equal(whole, in_chunks(engine, tokens, 250))


def test_memory_nodes_select_together(saved: Oracle) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", numa="2", **WIDE) as engine:
        whole = in_chunks(engine, saved.tokens, 512)
        assert np.array_equal(whole, in_chunks(engine, saved.tokens, 90, slot=1))
        assert saved.error(whole) <= 1.2 * saved.bf16_error  # of one prompt


def test_every_instruction_set_selects(isa: str, saved: Oracle) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", isa=isa, **WIDE) as engine:
        assert engine.plan.isa == isa
        assert saved.error(in_chunks(engine, saved.tokens, 512)) <= 1.2 * saved.bf16_error  # of one prompt


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "q4_k", "mxfp4", "nvfp4"])
def test_matrices_of_every_kind_of_rows_select(tmp_path: Path, format: str) -> None:
    path = write_checkpoint(tmp_path / "hf", FAMILY)
    tokens = np.arange(200) * 7 % 131
    with open_engine(path, tmp_path / "cache", weight_format=format, chunk_size=256) as engine:
        whole = step(engine, (0, 0, tokens))
        assert np.isfinite(whole).all() and np.array_equal(whole, in_chunks(engine, tokens, 9, slot=1))


def test_up_to_as_many_blocks_as_are_selected_bits_are_those_of_attention_to_all(tmp_path: Path) -> None:
    """In an engine whose sequences may be longer, and in one whose sequences may not, where no indexer runs."""
    tensors, tokens, found = random_tensors(CONFIGS[FAMILY]), np.arange(200) * 7 % 131, []
    for blocks, longest in ((1, 256), (1, INDEX_BLOCK), (2, 256)):
        path = write_tensors(tmp_path / f"{blocks}", {**CONFIGS[FAMILY], "index_topk_blocks": blocks}, tensors)
        with open_engine(path, tmp_path / "cache", max_seq_len=longest, chunk_size=256) as engine:
            kinds = {op.kind for op in engine.plan.ops}
            assert ("select_blocks" in kinds) == (blocks * INDEX_BLOCK < longest)
            found.append((step(engine, (0, 0, tokens[:longest])), engine.plan.kv.token_bytes))
    (long, more), (short, some), (all_, least) = found
    count = INDEX_BLOCK
    assert np.array_equal(long[:count], short[:count]) and np.array_equal(short[:count], all_[:count])
    assert not np.array_equal(long[count:], all_[count:])
    assert some == least and more - some == 2 * 32 * 2  # keys of two indexers, padded, in bf16


def test_a_device_computes_as_many_tokens_as_are_selected(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "hf", FAMILY)
    config = EngineConfig(model_path=path, weight_format="bf16", step_on="torch-cpu", device="simulated")
    with pytest.raises(
        ConfigError, match=r"no device computes \(BlockSelectedAttention\).* or a shorter --max-seq-len"
    ):
        plan_model(config)
    assert plan_model(replace(config, max_seq_len=INDEX_BLOCK)).device_ops


def test_a_device_gives_the_logits_of_the_threads(tmp_path: Path) -> None:
    """Where none selects, with clamped SwiGLU in dense, shared and routed feed-forwards."""
    pytest.importorskip("torch")
    wanted = oracle.save(tmp_path / "hf", FAMILY, num_experts_per_tok=8, initializer_range=0.1)
    sizes = {"max_seq_len": INDEX_BLOCK}
    with open_engine(wanted.path, tmp_path / "cache", **sizes) as engine:
        threads = wanted.error(step(engine, (0, 0, wanted.tokens)))
    on_device = {"step_on": "torch-cpu", "device": "simulated"}
    with open_engine(wanted.path, tmp_path / "cache", **sizes, **on_device) as engine:
        assert 0 < wanted.error(step(engine, (0, 0, wanted.tokens))) <= 1.3 * threads


def test_the_nested_configuration_of_a_published_model_says_the_same() -> None:
    config = {**CONFIGS[FAMILY], "num_hidden_layers": 3}
    flat = {"layer_types", "mlp_layer_types", "index_n_heads", "index_head_dim", "index_topk_blocks"}
    nested = {
        "sparse_attention_freq": [0, 1, 1],
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 20,
        "sparse_block_size": 128,
        "sparse_topk_blocks": 1,
        "sparse_local_block": 1,
        "sparse_init_block": 0,
        "sparse_score_type": "max",
    }
    published = {name: value for name, value in config.items() if name not in flat}
    published |= {"sparse_attention_config": nested, "moe_layer_freq": [0, 1, 1], "hidden_act": "swigluoai"}
    assert model_spec(published) == model_spec(config)
    whole = model_spec({"model_type": "minimax_m3_vl", "text_config": published, "vision_config": {}})
    assert replace(whole, model_type=FAMILY) == model_spec(config).inside("language_model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_block_size": 64}, "index_block_size is 64; it must be absent or 128"),
        ({"index_local_blocks": 2}, "index_local_blocks is 2; it must be absent or 1"),
        ({"index_n_heads": 1}, "index_n_heads 1 is not num_key_value_heads 2"),
        ({"index_head_dim": 10}, "index_head_dim is 10; it must be an integer from 12 to 1024"),
        ({"index_head_dim": 21}, "index_head_dim is 21; it must be even"),
        ({"index_topk_blocks": 0}, "index_topk_blocks is 0"),
        ({"layer_types": ["full_attention"]}, "a list of 3 of full_attention, minimax_m3_sparse"),
        ({"mlp_layer_types": ["moe"] * 3}, "a list of 3 of dense, sparse"),
        ({"swiglu_limit": 10.0}, "swiglu_limit is 10.0; it must be absent or 7.0"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0; it must be absent or 1.702"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2; it must be absent or 1"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"sparse_attention_config": {"sparse_init_block": 1}}, "sparse_attention_config.sparse_init_block is 1"),
        ({"sparse_attention_config": {"sparse_score_type": "mean"}}, "sparse_score_type is 'mean'"),
        ({"sparse_attention_config": {"use_sparse_attention": False}}, "use_sparse_attention is False"),
        (
            {"sparse_attention_config": {"sparse_attention_freq": [0, 1], "sparse_disable_index_value": [0, 0]}},
            "sparse_disable_index_value has a 0 for a layer that selects",
        ),
        ({"use_gemma_norm": False}, "use_gemma_norm is False; it must be absent or True"),
        ({"attention_output_gate": True}, "attention_output_gate is True; it must be absent or False"),
        ({"qk_norm_type": "per_layer"}, "qk_norm_type is 'per_layer'; it must be absent or per_head"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIGS[FAMILY], **changes})


def test_a_step_costs_what_it_reads_and_multiplies() -> None:
    """Of long sequences the keys of indexers, and of keys and values those that are selected."""
    spec = model_spec(CONFIGS[FAMILY])
    place, mixer = spec.place(1, FormatMix.uniform("bf16")), spec.layers[1].mixer
    assert isinstance(mixer, BlockSelectedAttention)
    plain, cost = mixer.within(INDEX_BLOCK), lambda load: mixer.cost(place, load)
    short, long, longer = (Load(1, 1, tokens, float(tokens), "bf16") for tokens in (INDEX_BLOCK, 1000, 2000))
    assert cost(long).bytes - cost(short).bytes == 1000 * 32 * 2  # keys and values are as many as before
    assert cost(longer).bytes - cost(long).bytes == 1000 * 32 * 2
    assert cost(longer).flops - cost(long).flops == 2 * 1000 * 2 * 20
    assert cost(short).bytes > plain.cost(place, short).bytes  # matrices of the indexer
