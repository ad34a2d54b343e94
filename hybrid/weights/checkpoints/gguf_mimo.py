"""MiMo-V2-Flash in GGUF files."""

from __future__ import annotations

from hybrid.models.decoder import FULL, MAX_LAYERS, SLIDING
from hybrid.models.deepseek import DENSE, SPARSE
from hybrid.weights.checkpoints.gguf_fields import (
    SIGMOID,
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

_VALUE_SCALE = 0.707  # of the published model, where a file does not say it


def mimo2(model: Gguf, metadata: GgufMetadata) -> Config:
    """Lists have an item for each layer, those that predict further tokens among them. A window is of the tokens before
    the one that looks. Which layers are dense, their tensors tell.
    """
    require_gating(metadata, SIGMOID, SIGMOID)
    require_weights(metadata, norm=True)
    count, every = layer_count(metadata), metadata.size("block_count", maximum=MAX_LAYERS)
    slides = _flags(metadata, every)[:count]
    heads = metadata.layer_sizes("attention.head_count_kv", every)[:count]
    everything, sliding = (_of_kind(metadata, heads, slides, kind) for kind in (False, True))
    part = metadata.size("rope.dimension_count") / max(1, key_length(metadata))
    base = metadata.number("rope.freq_base", 5e6)
    return {
        "model_type": "mimo_v2_flash",
        **routed(metadata),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "v_head_dim": metadata.size("attention.value_length"),
        "num_key_value_heads": everything or sliding,
        "swa_num_key_value_heads": sliding or everything,
        "sliding_window_size": metadata.size("attention.sliding_window"),
        "layer_types": [SLIDING if one else FULL for one in slides],
        "mlp_layer_types": [DENSE if has(model, "ffn_gate.weight", layer) else SPARSE for layer in range(count)],
        "attention_value_scale": metadata.number("attention.value_scale", _VALUE_SCALE),
        "rope_theta": base,
        "swa_rope_theta": metadata.number("rope.freq_base_swa", 1e4),
        "partial_rotary_factor": part,
    }


def _flags(metadata: GgufMetadata, count: int) -> list[bool]:
    """Of every layer whether it has a window; some files have numbers for this."""
    name = "attention.sliding_window_pattern"
    numbers = metadata.is_list(name) and not metadata.is_flags(name)
    return [size > 0 for size in metadata.layer_sizes(name, count)] if numbers else metadata.layer_flags(name, count)


def _of_kind(metadata: GgufMetadata, heads: list[int], slides: list[bool], kind: bool) -> int:
    """Key heads of the layers with a window, or of the others; 0 where there are none."""
    found = {own for own, slide in zip(heads, slides, strict=True) if slide == kind}
    if len(found) > 1:
        raise metadata.refuse("attention.head_count_kv", heads, "the same for all layers with a window, or without one")
    return next(iter(found), 0)
