"""Kimi Linear, Ling 3.0 and GLM-5.3-Flash in GGUF files: which layers attend is told by their numbers of key heads."""

from __future__ import annotations

from math import isclose

from hybrid.models.deepseek import FULL, SHARED
from hybrid.models.layers.indexer import KEY_EPS
from hybrid.weights.checkpoints.gguf_deepseek4 import streams_and_limits
from hybrid.weights.checkpoints.gguf_fields import (
    SIGMOID,
    kv_heads,
    layer_count,
    require_gating,
    require_weights,
    routed,
)
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config


def kimi_linear(model: Gguf, metadata: GgufMetadata) -> Config:
    require_weights(metadata, norm=True, scale=metadata.number("expert_weights_scale", 0.0))
    return {
        **_layers(metadata),
        "model_type": "kimi_linear",
        "linear_head_dim": metadata.size("kda.head_dim"),
        "linear_num_heads": metadata.size("attention.head_count"),
        "linear_conv_kernel_dim": metadata.size("ssm.conv_kernel"),
        "norm_topk_prob": True,
    }


def bailingmoe3(model: Gguf, metadata: GgufMetadata) -> Config:
    bounds = [model.metadata.get(f"bailingmoe3.swiglu_clamp_{which}") for which in ("exp", "shexp")]
    return {
        **_layers(metadata),
        "model_type": "bailing_hybrid",
        "head_dim": metadata.size("kda.head_dim"),
        "short_conv_kernel_size": metadata.size("ssm.conv_kernel"),
        "kda_safe_gate": metadata.flag("kda.safe_gate", True),
        "kda_lower_bound": metadata.number("kda.gate_lower_bound", -5.0),
        "norm_topk_prob": metadata.flag("expert_weights_norm", True),
        "expert_swiglu_limit_list": bounds[0],
        "share_expert_swiglu_limit_list": bounds[1],
    }


def glm5_next(model: Gguf, metadata: GgufMetadata) -> Config:
    """Without a bound of decays they have none. The dense layers are bounded as experts are, of which files tell."""
    eps, bound, types = "attention.layer_norm_epsilon", "kda.gate_lower_bound", "attention.indexer.types"
    if not isclose(metadata.number(eps, KEY_EPS), KEY_EPS, rel_tol=1e-6):
        raise metadata.refuse(eps, metadata.number(eps), f"{KEY_EPS:g}")
    found = {**_layers(metadata), **streams_and_limits(metadata)}
    if metadata.has(types):
        full = metadata.layer_flags(types, layer_count(metadata))
        found["indexer_types"] = [FULL if its else SHARED for its in full]
    return {
        **found,
        "model_type": "glm5_next_text",
        "norm_topk_prob": metadata.flag("expert_weights_norm", True),
        "linear_head_dim": metadata.size("kda.head_dim"),
        "linear_num_heads": metadata.size("attention.head_count"),
        "linear_conv_kernel_dim": metadata.size("ssm.conv_kernel"),
        "linear_lower_bound": metadata.number(bound) if metadata.has(bound) else None,
        "index_n_heads": metadata.size("attention.indexer.head_count"),
        "index_head_dim": metadata.size("attention.indexer.key_length"),
        "index_topk": metadata.size("attention.indexer.top_k"),
        "index_kpool": metadata.size("attention.indexer.kpool"),
        "index_kpool_always_select_tail": metadata.flag("attention.indexer.kpool_select_tail", True),
    }


def _layers(metadata: GgufMetadata) -> Config:
    """Latent attention without what turns, experts of DeepSeek-V3."""
    require_gating(metadata, SIGMOID, SIGMOID)
    turned = metadata.size("rope.dimension_count")
    return {
        **routed(metadata),
        "layer_types": ["full_attention" if heads else "linear_attention" for heads in kv_heads(metadata)],
        "num_key_value_heads": metadata.size("attention.head_count"),
        "q_lora_rank": metadata.size("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": metadata.size("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": metadata.size("attention.key_length_mla") - turned,
        "v_head_dim": metadata.size("attention.value_length_mla"),
        "head_dim": None,
        "partial_rotary_factor": None,
        "attention_bias": False,
        "n_shared_experts": metadata.size("expert_shared_count", 1),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "first_k_dense_replace": metadata.size("leading_dense_block_count", 0),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "n_group": metadata.size("expert_group_count", 0) or 1,
        "topk_group": metadata.size("expert_group_used_count", 0) or 1,
    }
