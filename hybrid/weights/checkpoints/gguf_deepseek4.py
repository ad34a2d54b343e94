"""DeepSeek-V4 in GGUF files."""

from __future__ import annotations

from hybrid.weights.checkpoints.gguf_fields import ROOT_SOFTPLUS, layer_count, require_gating, require_weights
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config


def deepseek4(model: Gguf, metadata: GgufMetadata) -> Config:
    """Numbers of tokens that make an entry, which layers have, may go on behind the last one."""
    scale = metadata.number("expert_weights_scale", 0.0) or 1.0
    require_gating(metadata, ROOT_SOFTPLUS, ROOT_SOFTPLUS)
    require_weights(metadata, norm=True, scale=scale)
    return {
        **streams_and_limits(metadata),
        "model_type": "deepseek_v4",
        "q_lora_rank": metadata.size("attention.q_lora_rank"),
        "qk_rope_head_dim": metadata.size("rope.dimension_count"),
        "partial_rotary_factor": None,
        "o_lora_rank": metadata.size("attention.output_lora_rank"),
        "o_groups": metadata.size("attention.output_group_count"),
        "sliding_window": metadata.size("attention.sliding_window"),
        "compress_ratios": metadata.layer_sizes("attention.compress_ratios", layer_count(metadata), longer=True),
        "compress_rope_theta": metadata.number("attention.compress_rope_freq_base"),
        "index_n_heads": metadata.size("attention.indexer.head_count"),
        "index_head_dim": metadata.size("attention.indexer.key_length"),
        "index_topk": metadata.size("attention.indexer.top_k"),
        "num_hash_layers": metadata.size("hash_layer_count"),
        "n_routed_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "n_shared_experts": metadata.size("expert_shared_count"),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "routed_scaling_factor": scale,
    }


def streams_and_limits(metadata: GgufMetadata) -> Config:
    """The streams of the residual stream, and the bound of what experts multiply: one for all of them."""
    names = "swiglu_clamp_exp", "swiglu_clamp_shexp"
    limit = metadata.number(names[0])
    if metadata.number(names[1], limit) != limit:
        raise metadata.refuse(names[1], metadata.number(names[1]), f"{limit:g}, as {names[0]}")
    return {
        "hc_mult": metadata.size("hyper_connection.count"),
        "hc_sinkhorn_iters": metadata.size("hyper_connection.sinkhorn_iterations"),
        "hc_eps": metadata.number("hyper_connection.epsilon"),
        "swiglu_limit": limit,
    }
