"""Models with layers of Mamba-2 in GGUF files: which layers attend is told by their numbers of key heads."""

from __future__ import annotations

from hybrid.weights.checkpoints.gguf_dense import granite
from hybrid.weights.checkpoints.gguf_fields import SOFTMAX, has, kv_heads, layer_count, require_gating
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


def conv_bias(model: Gguf, metadata: GgufMetadata) -> bool:
    """Whether convolutions have one: those that are seen do."""
    layers = [layer for layer in range(layer_count(metadata)) if has(model, "ssm_conv1d.weight", layer)]
    return all(has(model, "ssm_conv1d.bias", layer) for layer in layers)
