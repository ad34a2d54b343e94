"""MiniMax-M2 and M3 in GGUF files."""

from __future__ import annotations

from hybrid.models.decoder import FULL
from hybrid.models.deepseek import DENSE, SPARSE
from hybrid.models.families.minimax_m3_vl_text import SELECTING
from hybrid.weights.checkpoints.gguf_fields import SIGMOID, layer_count, require_gating, require_weights, routed
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config


def minimax_m2(model: Gguf, metadata: GgufMetadata) -> Config:
    require_gating(metadata, SIGMOID, SIGMOID)
    require_weights(metadata, norm=True)
    return {
        "model_type": "minimax_m2",
        **routed(metadata),
        "intermediate_size": metadata.size("expert_feed_forward_length"),
    }


def minimax_m3(model: Gguf, metadata: GgufMetadata) -> Config:
    """Layers with experts select blocks, the dense ones before them do not: no other model can be told."""
    scale = metadata.number("expert_weights_scale", 0.0) or 1.0
    require_gating(metadata, SIGMOID, SIGMOID)
    require_weights(metadata, norm=True, scale=scale)
    count, wide = layer_count(metadata), metadata.size("expert_feed_forward_length")
    dense = min(count, metadata.size("leading_dense_block_count", 0))
    shared = metadata.size("expert_shared_count")
    return {
        "model_type": "minimax_m3_vl_text",
        **routed(metadata),
        "intermediate_size": wide,
        "dense_intermediate_size": metadata.size("feed_forward_length"),
        "n_shared_experts": shared,
        "shared_intermediate_size": wide * shared,
        "routed_scaling_factor": scale,
        "mlp_layer_types": [DENSE] * dense + [SPARSE] * (count - dense),
        "layer_types": [FULL] * dense + [SELECTING] * (count - dense),
        "index_n_heads": metadata.size("attention.indexer.head_count"),
        "index_head_dim": metadata.size("attention.indexer.key_length"),
        "index_topk_blocks": metadata.size("attention.indexer.top_k"),
        "index_block_size": metadata.size("attention.indexer.block_size"),
        "index_local_blocks": metadata.size("attention.indexer.local_blocks"),
    }
