"""Hunyuan in GGUF files: the first with experts, and Hunyuan 3."""

from __future__ import annotations

from hybrid.models.deepseek import DENSE, SPARSE
from hybrid.weights.checkpoints.gguf_fields import (
    SIGMOID,
    SOFTMAX,
    has,
    layer_count,
    require_gating,
    require_weights,
    routed,
)
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config


def hunyuan_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=True)
    return {
        "model_type": "hunyuan_v1_moe",
        "num_experts": metadata.size("expert_count"),
        "moe_topk": metadata.size("expert_used_count"),
        "intermediate_size": metadata.size("expert_feed_forward_length"),
    }


def hy_v3(model: Gguf, metadata: GgufMetadata) -> Config:
    """Layers that have the matrix of a dense feed-forward are dense; nothing else tells them."""
    scale = metadata.number("expert_weights_scale", 0.0) or 1.0
    require_gating(metadata, SIGMOID, SIGMOID)
    require_weights(metadata, norm=True, scale=scale)
    wide, name = metadata.size("expert_feed_forward_length"), "expert_shared_feed_forward_length"
    shared = metadata.size(name, wide)
    if not wide or shared % wide:
        raise metadata.refuse(name, shared, f"a multiple of expert_feed_forward_length, {wide}")
    layers = range(min(layer_count(metadata), len(model.tensors)))
    return {
        "model_type": "hy_v3",
        **routed(metadata),
        "moe_intermediate_size": wide,
        "num_shared_experts": shared // wide,
        "router_scaling_factor": scale,
        "mlp_layer_types": [DENSE if has(model, "ffn_gate.weight", layer) else SPARSE for layer in layers],
    }
