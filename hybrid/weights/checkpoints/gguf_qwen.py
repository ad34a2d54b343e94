"""Qwen's models in GGUF files."""

from __future__ import annotations

from hybrid.weights.checkpoints.gguf_fields import (
    SOFTMAX,
    has,
    key_length,
    layer_count,
    require_gating,
    require_weights,
    routed,
)
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config


def qwen(model: Gguf, metadata: GgufMetadata) -> Config:
    """Those with images are, of text alone, the model without."""
    return {"model_type": metadata.architecture.removesuffix("vl")}


def _expert_width(metadata: GgufMetadata) -> int:
    """Older files tell the width of all chosen experts together."""
    if metadata.has("expert_feed_forward_length"):
        return metadata.size("expert_feed_forward_length")
    return metadata.size("feed_forward_length") // max(1, metadata.size("expert_used_count"))


def qwen2_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=False)
    width = metadata.size("expert_shared_feed_forward_length", metadata.size("feed_forward_length", 0))
    return {
        "model_type": "qwen2_moe",
        **routed(metadata),
        "moe_intermediate_size": _expert_width(metadata),
        "shared_expert_intermediate_size": width,
        "norm_topk_prob": False,
        "qkv_bias": has(model, "attn_q.bias"),
    }


def qwen3_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=True)
    return {
        "model_type": "qwen3_moe",
        **routed(metadata),
        "moe_intermediate_size": _expert_width(metadata),
        "norm_topk_prob": True,
    }


def qwen3_next(model: Gguf, metadata: GgufMetadata) -> Config:
    return {"model_type": "qwen3_next", **_delta(model, metadata), **_shared_experts(metadata)}


def qwen3_5(model: Gguf, metadata: GgufMetadata) -> Config:
    return {"model_type": "qwen3_5_text", **_delta(model, metadata), **_heads_in_turn(metadata)}


def qwen3_5_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    found = {**_delta(model, metadata), **_heads_in_turn(metadata), **_shared_experts(metadata)}
    return {"model_type": "qwen3_5_moe_text", **found}


def _delta(model: Gguf, metadata: GgufMetadata) -> Config:
    """Which layers attend is told in two ways, or not at all; those that do not have decays."""
    values, dim = metadata.size("ssm.time_step_rank"), key_length(metadata)
    layers = range(min(layer_count(metadata), len(model.tensors)))
    return {
        "linear_conv_kernel_dim": metadata.size("ssm.conv_kernel"),
        "linear_key_head_dim": metadata.size("ssm.state_size"),
        "linear_num_key_heads": metadata.size("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": metadata.size("ssm.inner_size") // max(1, values),
        "layer_types": ["linear_attention" if has(model, "ssm_a", layer) else "full_attention" for layer in layers],
        "partial_rotary_factor": metadata.size("rope.dimension_count", dim) / max(1, dim),
    }


def _heads_in_turn(metadata: GgufMetadata) -> Config:
    """Value heads lie as the program repeats those of keys that made the file: all of them, once more and once more."""
    in_turn = metadata.size("ssm.group_count") != metadata.size("ssm.time_step_rank")
    return {"linear_value_heads_in_turn": True} if in_turn else {}


def _shared_experts(metadata: GgufMetadata) -> Config:
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=True)
    return {
        **routed(metadata),
        "moe_intermediate_size": _expert_width(metadata),
        "shared_expert_intermediate_size": metadata.size("expert_shared_feed_forward_length"),
        "norm_topk_prob": True,
    }
