"""Latent attention in an engine: the same bits however a prompt is run, every KV format, what a store holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
from checkpoints import FP8, as_fp8, dequantised, packed, random_tensors, write_tensors
from configs import CONFIGS
from oracle import Oracle
from steps import in_chunks, open_engine, step

from hybrid.config import KV_FORMATS
from hybrid.engine.engine import Engine
from hybrid.errors import ConfigError
from hybrid.formats import FORMATS
from hybrid.models import model_spec

FAMILIES = ("deepseek_v2", "deepseek_v3")
LENGTH = 300  # more than a block of keys


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    changes = {"max_position_embeddings": 512}
    return oracle.save(tmp_path_factory.mktemp("latent") / "hf", request.param, length=LENGTH, **changes)


@pytest.fixture(params=KV_FORMATS)
def engine(request: pytest.FixtureRequest, saved: Oracle) -> Iterator[Engine]:
    with open_engine(
        saved.path, saved.path.parent / "cache", kv_format=request.param, chunk_size=LENGTH + 60
    ) as opened:
        yield opened


def test_a_prompt_gives_the_same_bits_whole_in_chunks_and_beside_others(saved, engine) -> None:
    tokens = saved.tokens
    whole = step(engine, (0, 0, tokens))
    assert np.array_equal(
        whole, np.concatenate([in_chunks(engine, tokens[:256], 100, 1), last(engine, tokens, 256, 1)])
    )
    step(engine, (2, 0, tokens[:40]))
    together = step(engine, (0, LENGTH, tokens[:1]), (2, 40, tokens[:9]), (3, 0, tokens))
    assert np.array_equal(whole, together[10:])
    with open_engine(saved.path, saved.path.parent / "cache", threads=1, kv_format=engine.plan.kv.format) as other:
        assert np.array_equal(whole[:90], step(other, (0, 0, tokens[:90])))


def last(engine: Engine, tokens: np.ndarray, first: int, slot: int) -> np.ndarray:
    """Logits of the tokens from `first` on, each in a step of its own."""
    return np.concatenate([step(engine, (slot, i, tokens[i : i + 1])) for i in range(first, len(tokens))])


def test_rows_of_fewer_bits_cost_little_accuracy(saved, engine) -> None:
    format = engine.plan.kv.format
    assert engine.plan.kv.token_bytes == 3 * (128 if format == "bf16" else 68)  # 64 dimensions, stored once
    error = saved.error(step(engine, (0, 0, saved.tokens)))
    assert error <= {"bf16": 1, "int8": 2, "fp8": 6}[format] * saved.bf16_error


def test_every_instruction_set_agrees(isa, saved) -> None:
    with open_engine(saved.path, saved.path.parent / "cache", isa=isa) as engine:
        logits = in_chunks(engine, saved.tokens, 100)
    assert saved.error(logits) <= saved.bf16_error


def test_published_fp8_is_read_as_it_is_and_the_matrices_of_heads_exactly_enough(tmp_path: Path) -> None:
    """The first projection has a last square that is cut short, and heads do not end where squares do."""
    sizes = {"hidden_size": 192, "q_lora_rank": 48, "kv_lora_rank": 160}
    config = {**CONFIGS["deepseek_v3"], **sizes, "quantization_config": FP8}
    tensors = as_fp8(random_tensors(config))
    with_mtp = {**tensors, "model.layers.3.eh_proj.weight": np.zeros((4, 4), ml_dtypes.bfloat16)}
    store = packed(write_tensors(tmp_path / "fp8", config, with_mtp))
    assert store.mix.attention == "fp8"
    of = "model.layers.0.self_attn.{}.weight"
    both = [dequantised(tensors, of.format(name)) for name in ("q_a_proj", "kv_a_proj_with_mqa")]
    low = FORMATS["fp8"].unpack(store.array("layers.0.attention.low"), 48 + 172, 192)
    assert np.array_equal(low, np.concatenate(both))
    up = dequantised(tensors, of.format("kv_b_proj")).reshape(6, 48, 160)
    for name, rows in (("keys", up[:, :20].transpose(0, 2, 1)), ("values", up[:, 20:])):
        held = store.array(f"layers.0.attention.{name}").reshape(6, -1)
        for head in range(6):
            matrix = FORMATS["bf16"].unpack(held[head], *rows.shape[1:])
            assert np.array_equal(matrix, rows[head].astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deepseek_v3", {"qk_rope_head_dim": 13}, "qk_rope_head_dim 13 must be at most 1024 together"),
        ("deepseek_v3", {"kv_lora_rank": 1020}, "kv_lora_rank 1020 and qk_rope_head_dim 12 must be at most 1024"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2; it must be absent or 6"),
        (
            "deepseek_v3",
            {"scoring_func": "softmax"},
            "scoring_func is 'softmax'; it must be one of the supported sigmoid",
        ),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'; it must be one of the supported noaux_tc"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2; it must be absent or 1"),
        ("deepseek_v3", {"n_group": 3}, "8 experts in n_group 3 groups"),
        ("deepseek_v3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type is 'dynamic'"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias is True; it must be absent or False"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True; it must be absent or False"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "one of the supported greedy, group_limited_greedy"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias is True; it must be absent or False"),
        ("glm4_moe_lite", {"mlp_layer_types": ["moe"] * 3}, "a list of 3 of dense, sparse"),
    ],
)
def test_what_the_families_do_not_compute_is_refused(family, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIGS[family], **changes})
