"""What every family is, told by its own code: by the spec of a small model, and by the first words of its file."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from hybrid.formats.mix import FormatMix
from hybrid.models import families, model_spec, supported_models
from hybrid.models.spec import ModelSpec

# A small model: every family reads the fields that it knows. A family that needs another adds it here.
_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_topk": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_GEMMA4 = {
    "enable_moe_block": True,
    "top_k_experts": 2,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 16,
}
_SELECTS = {"index_topk": 16}
_GRANITE4 = {
    "layer_types": ["mamba", "attention"],
    "num_local_experts": 4,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
}
_BAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 16}
_V4 = {"num_key_value_heads": 1, "head_dim": 32, "o_groups": 2, "o_lora_rank": 16, "index_head_dim": 32}
_BLOCKS = {
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "index_head_dim": 16,
    "index_topk_blocks": 1,
}
_NEMOTRON = {
    "layers_block_type": ["mamba", "moe", "attention", "mlp"],
    "moe_shared_expert_intermediate_size": 32,
    "mamba_num_heads": 8,
    "n_groups": 2,
}
_DELTA = {"layer_types": ["linear_attention", "full_attention"]}
_QWEN4 = {
    **_DELTA,
    "hc_lowrank": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 100,
    "split_ngram_parts": 2,
    "eos_token_id": 1,
}
_OWN: dict[str, dict[str, Any]] = {  # of one family
    **dict.fromkeys(("lfm2", "lfm2_vl"), {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    **dict.fromkeys(("minimax_m3_vl", "minimax_m3_vl_text"), _BLOCKS),
    **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA4),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _SELECTS),
    "granitemoehybrid": _GRANITE4,
    "bamba": _BAMBA,
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), _DELTA),
    **dict.fromkeys(("glm5_next", "glm5_next_text"), {**_DELTA, **_SELECTS, "qk_rope_head_dim": 0}),
    "deepseek_v4": _V4,
    "mimo_v2_flash": {"num_key_value_heads": 2, "head_dim": 32, "n_shared_experts": 0},
    "nemotron_h": _NEMOTRON,
    **dict.fromkeys(("step3p5", "step3p7"), {"moe_layers_enum": [1], "swiglu_limits": [7.0, 7.0]}),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), _QWEN4),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid"), _DELTA
    ),
}


@dataclass(frozen=True)
class Family:
    """What a family is: `name` for people, whether it has experts, and the kinds of layers that no device computes."""

    model_type: str
    name: str
    experts: bool
    without_device: tuple[str, ...]


def all_families() -> list[Family]:
    """Every family that can be loaded, by `model_type`."""
    return [_family(model_type) for model_type in supported_models()]


def small_spec(model_type: str) -> ModelSpec:
    """The spec of a small model of this family."""
    small = {**_SMALL, **_OWN.get(model_type, {})}
    return model_spec({**small, "model_type": model_type, "text_config": small})


def _family(model_type: str) -> Family:
    spec, module = small_spec(model_type), importlib.import_module(f"{families.__name__}.{model_type}")
    name = (module.__doc__ or model_type).partition(":")[0]
    halves = list(spec.halves(FormatMix.uniform("bf16")))
    missing = dict.fromkeys(type(half).__name__ for place, half in halves if half.device_needs(place) is None)
    return Family(model_type, name, bool(spec.moe_layers), tuple(missing))
