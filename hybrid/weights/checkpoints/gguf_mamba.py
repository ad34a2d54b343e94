"""Models with layers of Mamba-2 in GGUF files: which layers attend is told by their numbers of key heads."""

from __future__ import annotations

from hybrid.weights.checkpoints.gguf_dense import granite
from hybrid.weights.checkpoints.gguf_fields import SIGMOID, SOFTMAX, has, kv_heads, layer_count, require_gating
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config

TURNS = "rope.scaling.finetuned"  # whether attention has rope, in files of these models


def granite_hybrid(model: Gguf, metadata: GgufMetadata) -> Config:
    inner, hidden = metadata.size("ssm.inner_size"), metadata.size("embedding_length")
    if inner % max(1, hidden):
        raise metadata.refuse("ssm.inner_size", inner, f"a multiple of embedding_length, {hidden}")
    return {
        **granite_experts(model, metadata),
        "layer_types": ["attention" if heads else "mamba" for heads in kv_heads(metadata)],
        "position_embedding_type": "rope" if metadata.flag(TURNS, False) else "nope",
        "mamba_n_heads": metadata.size("ssm.time_step_rank"),
        "mamba_n_groups": metadata.size("ssm.group_count"),
        "mamba_d_state": metadata.size("ssm.state_size"),
        "mamba_d_conv": metadata.size("ssm.conv_kernel"),
        "mamba_expand": inner // max(1, hidden),
        "mamba_conv_bias": conv_bias(model, metadata),
    }


def granite_experts(model: Gguf, metadata: GgufMetadata) -> Config:
    """Of Granite with what all rows share: every layer attends, and has rope."""
    experts = metadata.size("expert_count", 0)
    if experts:
        require_gating(metadata, SOFTMAX, SOFTMAX)
    wide = metadata.size("feed_forward_length", 0)
    return {
        **granite(model, metadata),
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * layer_count(metadata),
        "position_embedding_type": "rope",
        "num_local_experts": experts,
        "num_experts_per_tok": metadata.size("expert_used_count", 0) or None,
        "shared_intermediate_size": metadata.size("expert_shared_feed_forward_length", wide),
    }


def nemotron_h(model: Gguf, metadata: GgufMetadata) -> Config:
    """A layer that neither attends nor has a feed-forward is Mamba-2."""
    experts, heads = metadata.size("expert_count", 0), max(1, metadata.size("ssm.time_step_rank"))
    wide, attends = metadata.layer_sizes("feed_forward_length", layer_count(metadata)), kv_heads(metadata)
    feed_forward = "moe" if experts else "mlp"
    found = {
        "model_type": "nemotron_h",
        "intermediate_size": max(wide) or None,
        "layers_block_type": [
            "attention" if kv else feed_forward if size else "mamba" for kv, size in zip(attends, wide, strict=True)
        ],
        "mamba_num_heads": heads,
        "mamba_head_dim": metadata.size("ssm.inner_size") // heads,
        "n_groups": metadata.size("ssm.group_count"),
        "ssm_state_size": metadata.size("ssm.state_size"),
        "conv_kernel": metadata.size("ssm.conv_kernel"),
        "use_conv_bias": conv_bias(model, metadata),
    }
    return found | _nemotron_experts(metadata) if experts else found


def _nemotron_experts(metadata: GgufMetadata) -> Config:
    require_gating(metadata, SIGMOID, SIGMOID)
    return {
        "n_routed_experts": metadata.size("expert_count"),
        "moe_latent_size": metadata.size("moe_latent_size", 0) or None,
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "n_shared_experts": metadata.size("expert_shared_count", 1),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": metadata.size("expert_shared_feed_forward_length"),
        "norm_topk_prob": metadata.flag("expert_weights_norm", True),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "n_group": metadata.size("expert_group_count", 0) or 1,
        "topk_group": metadata.size("expert_group_used_count", 0) or 1,
    }


def conv_bias(model: Gguf, metadata: GgufMetadata) -> bool:
    """Whether convolutions have one: those that are seen do."""
    layers = [layer for layer in range(layer_count(metadata)) if has(model, "ssm_conv1d.weight", layer)]
    return all(has(model, "ssm_conv1d.bias", layer) for layer in layers)
