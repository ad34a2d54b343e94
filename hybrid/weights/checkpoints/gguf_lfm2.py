"""LFM2 in GGUF files: which layers attend is told by their numbers of key heads."""

from __future__ import annotations

from hybrid.weights.checkpoints.gguf_fields import SIGMOID, kv_heads, require_gating, routed
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config


def lfm2(model: Gguf, metadata: GgufMetadata) -> Config:
    return {
        "model_type": "lfm2",
        "layer_types": ["full_attention" if heads else "conv" for heads in kv_heads(metadata)],
        "conv_L_cache": metadata.size("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,
    }


def lfm2_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    require_gating(metadata, SIGMOID, SIGMOID)
    return {
        **lfm2(model, metadata),
        "model_type": "lfm2_moe",
        **routed(metadata),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "num_dense_layers": metadata.size("leading_dense_block_count", 0),
        "norm_topk_prob": metadata.flag("expert_weights_norm", True),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "use_expert_bias": True,
    }
