"""Kimi Linear and Ling 3.0: what is published, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors, write_tensors
from configs import CONFIGS
from gguf_rig import gguf_metadata, gguf_tensors, write_gguf, write_model
from steps import open_engine, step

from hybrid.config import EngineConfig
from hybrid.errors import ConfigError, WeightsError
from hybrid.formats.block import round_up
from hybrid.models import model_spec
from hybrid.models.layers.gated_latent import GatedLatentAttention
from hybrid.models.layers.kimi_delta import KimiDeltaAttention
from hybrid.models.layers.latent import LatentAttention
from hybrid.weights.checkpoints.opening import open_checkpoint

LINEAR = CONFIGS["kimi_linear"]["linear_attn_config"]


def test_mixers_are_those_that_are_published() -> None:
    """Of Kimi-Linear-48B-A3B and Ling-3.0-flash."""
    kimi = model_spec(
        {
            "model_type": "kimi_linear", "vocab_size": 163840, "hidden_size": 2304, "intermediate_size": 9216,
            "num_hidden_layers": 27, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 72,
            "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "mla_use_nope": True, "moe_intermediate_size": 1024, "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid", "num_experts": 256, "num_experts_per_token": 8,
            "num_shared_experts": 1, "num_expert_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446,
            "first_k_dense_replace": 1, "model_max_length": 1048576, "num_nextn_predict_layers": 0,
            "linear_attn_config": {
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32,
                "kda_layers": [n for n in range(1, 28) if n not in (4, 8, 12, 16, 20, 24, 27)],
                "short_conv_kernel_size": 4,
            },
        }
    )  # fmt: skip
    delta, attention = kimi.layers[0].mixer, kimi.layers[3].mixer
    assert isinstance(delta, KimiDeltaAttention) and (delta.heads, delta.head_dim, delta.rank) == (32, 128, 128)
    assert isinstance(attention, LatentAttention) and attention.rope is None and attention.row_dim == 576
    assert [layer for layer in range(27) if kimi.layers[layer].mixer == attention] == [3, 7, 11, 15, 19, 23, 26]
    router = kimi.layers[1].feed_forward.router
    assert router and (router.kind, router.scale, router.top_k, kimi.max_position) == ("sigmoid", 2.446, 8, 1048576)
    ling = model_spec(
        {
            "model_type": "bailing_hybrid", "vocab_size": 157184, "hidden_size": 2560, "intermediate_size": 6144,
            "num_hidden_layers": 42, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
            "moe_intermediate_size": 768, "num_experts": 512, "num_shared_experts": 1, "num_experts_per_tok": 8,
            "n_group": 8, "topk_group": 4, "score_function": "sigmoid", "partial_rotary_factor": 0.5,
            "rope_scaling": None, "rope_theta": 6000000, "moe_shared_expert_intermediate_size": 768,
            "expert_swiglu_limit_list": [0.0] * 35 + [4.0] * 8, "no_kda_lora": True, "num_nextn_predict_layers": 1,
        }
    )  # fmt: skip
    delta, attention = ling.layers[0].mixer, ling.layers[5].mixer
    assert isinstance(delta, KimiDeltaAttention) and (delta.rank, delta.lower_bound) == (0, -5.0)
    assert isinstance(attention, GatedLatentAttention) and attention.rope and attention.rope.interleaved
    assert [layer for layer in range(42) if ling.layers[layer].mixer == attention] == [5, 11, 17, 23, 29, 35, 41]
    assert [layer.feed_forward.is_moe for layer in ling.layers[:3]] == [False, False, True]
    assert [layer.feed_forward.bound for layer in ling.layers] == [0] * 35 + [4] * 7


def test_outputs_of_mixers_have_the_names_that_are_published() -> None:
    """What channels find has another projection than what heads attend to."""
    names = {name for name, _ in model_spec(CONFIGS["bailing_hybrid"]).checkpoint_shapes()}
    assert {f"model.layers.{layer}.attention.{out}.weight" for layer, out in ((0, "o_proj"), (1, "dense"))} < names
    assert "model.layers.0.attention.dense.weight" not in names


LIMITS = {"expert_swiglu_limit_list": [9, 0, None, 4.0, 5], "share_expert_swiglu_limit_list": [0, 5, 7, 0]}


def test_bounds_are_those_of_layers_with_experts(tmp_path: Path) -> None:
    config = {**CONFIGS["bailing_hybrid"], **LIMITS}
    halves = [layer.feed_forward for layer in model_spec(config).layers]
    assert [(half.bound, half.shared_bound) for half in halves] == [(0, 0), (0, 5), (0, 7), (4, 0)]
    extra = {f"bailingmoe3.swiglu_clamp_{kind}": [0.0, 5.0, 0.0, 4.0] for kind in ("exp", "shexp")}
    path = write_model(tmp_path / "model.gguf", config, random_tensors(config), extra)
    found = [layer.feed_forward.bound for layer in open_checkpoint(path).spec.layers]
    assert found == [0, 5, 0, 4]
    with pytest.raises(ConfigError, match="bound what experts make, which no cache knows of; use --device cpu"):
        open_engine(write_tensors(tmp_path / "hf", config, random_tensors(config)), tmp_path, device="simulated")


@pytest.mark.parametrize("numa", ["off", "2"])
def test_bounds_count_where_they_are_reached(tmp_path: Path, numa) -> None:
    found = []
    for bound in (0, 1e6, 0.01):
        limits = dict.fromkeys(("expert_swiglu_limit_list", "share_expert_swiglu_limit_list"), [bound] * 4)
        config = {**CONFIGS["bailing_hybrid"], **limits}
        path = write_tensors(tmp_path / f"{bound}", config, random_tensors(config))
        with open_engine(path, tmp_path / "cache", numa=numa) as engine:
            found.append(step(engine, (0, 0, np.arange(20))))
    assert found[0].tobytes() == found[1].tobytes() and not np.allclose(found[0], found[2], rtol=0.01)


@pytest.mark.parametrize("family", ["kimi_linear", "bailing_hybrid"])
@pytest.mark.parametrize("rate", [0.0, np.nan, np.inf])
def test_decays_of_gguf_files_that_are_no_rates_are_refused(tmp_path: Path, family, rate) -> None:
    config: dict[str, Any] = {**CONFIGS[family]}
    if family == "kimi_linear":
        config["linear_attn_config"] = {**LINEAR, "num_heads": 6}
    tensors = gguf_tensors(config, random_tensors(config))
    tensors["blk.0.ssm_a"] = np.full_like(tensors["blk.0.ssm_a"], rate)
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), tensors)
    with pytest.raises(WeightsError, match=r"tensor blk\.0\.ssm_a holds NaN or infinity"):
        open_engine(path, tmp_path / "cache")


@pytest.mark.parametrize("family", ["kimi_linear", "bailing_hybrid"])
def test_no_device_computes_them(tmp_path: Path, family) -> None:
    path = write_tensors(tmp_path / "hf", CONFIGS[family], random_tensors(CONFIGS[family]))
    with pytest.raises(ConfigError, match="KimiDeltaAttention"):
        open_engine(path, tmp_path / "cache", step_on="torch-cpu")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "kimi_linear",
            {"linear_attn_config": {**LINEAR, "head_dim": 257}},
            "linear_head_dim is 257; .* from 1 to 256",
        ),
        ("kimi_linear", {"linear_attn_config": {**LINEAR, "kda_layers": [1, 2, 3, 4]}}, "each once: correct them"),
        ("kimi_linear", {"linear_attn_config": {**LINEAR, "full_attn_layers": [5]}}, "from 1 to num_hidden_layers 4"),
        ("kimi_linear", {"linear_attn_config": {**LINEAR, "gate_lower_bound": -5.0}}, "gate_lower_bound is -5.0"),
        ("kimi_linear", {"linear_attn_config": {**LINEAR, "use_full_rank_gate": True}}, "use_full_rank_gate is True"),
        (
            "kimi_linear",
            {"n_group": 2, "use_grouped_topk": False},
            "use_grouped_topk is False; it must be absent or True",
        ),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope is False; it must be absent or True"),
        ("kimi_linear", {"mla_use_output_gate": True}, "mla_use_output_gate is True; it must be absent or False"),
        ("kimi_linear", {"attn_res_block_size": 2}, "attn_res_block_size is 2; it must be absent"),
        ("kimi_linear", {"moe_router_activation_func": "softmax"}, "scoring_func is 'softmax'"),
        ("bailing_hybrid", {"short_conv_kernel_size": 9}, "short_conv_kernel_size is 9; .* from 2 to 8"),
        ("bailing_hybrid", {"kda_lower_bound": 0.5}, "kda_lower_bound is 0.5; it must be below 0 and above -80"),
        ("bailing_hybrid", {"kda_lower_bound": -81}, "kda_lower_bound is -81; it must be a number above -80"),
        ("bailing_hybrid", {"layer_types": ["conv"] * 4}, "a list of 4 of full_attention, linear_attention"),
        ("bailing_hybrid", {"expert_swiglu_limit_list": [0, 0, 7.0]}, "list is \\[0, 0, 7.0\\]; .* each of 4 layers"),
        ("bailing_hybrid", {"share_expert_swiglu_limit_list": [0, 0, -1, 0]}, "above 0, 0 or null for each of 4"),
        ("bailing_hybrid", {"architectures": ["BailingMoeV2_5ForCausalLM"]}, "before 3.0, whose layers have lightning"),
        ("bailing_hybrid", {"linear_attention": "gla"}, "linear_attention is 'gla'"),
        ("bailing_hybrid", {"moe_router_enable_expert_bias": False}, "expert_bias is False; it must be absent or True"),
        ("bailing_hybrid", {"use_kda_lora": True}, "use_kda_lora is True; it must be absent or False"),
        ("bailing_hybrid", {"gated_attention_proj_granularity_type": "element_wise"}, "the supported head_wise"),
        ("bailing_hybrid", {"moe_shared_expert_intermediate_size": 41}, "is 41; it must be absent or 80"),
    ],
)
def test_what_the_families_do_not_compute_is_refused(family, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        model_spec({**CONFIGS[family], **changes})


def test_a_plan_knows_the_state() -> None:
    """Of one head: its matrix, of a run keys, values, and a decay for each channel; the convolution of three tokens."""
    (delta,) = {layer.mixer for layer in model_spec(CONFIGS["bailing_hybrid"]).layers} - {
        model_spec(CONFIGS["bailing_hybrid"]).layers[1].mixer
    }
    of_head = 32 * 20 + 160 + 8 * 32 + 8 * 20
    assert delta.state(100, "bf16").nbytes == 4 * 6 * of_head + round_up(4 * (2 + 7) * 3 * 6 * 20, 64)
    assert EngineConfig().kv_format  # states are fp32, whatever it is
