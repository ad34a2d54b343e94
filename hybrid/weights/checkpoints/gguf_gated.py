"""Models with layers that have a window and another rope in GGUF files: Trinity, Laguna, Mellum and Step-3.5."""

from __future__ import annotations

from hybrid.models.decoder import FULL, SLIDING
from hybrid.models.deepseek import DENSE, SPARSE
from hybrid.weights.checkpoints.gguf_fields import (
    SIGMOID,
    SOFTMAX,
    block_count,
    has,
    key_length,
    layer_count,
    query_heads,
    require_gating,
    require_weights,
    routed,
)
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config, rope_scaling

_EVERY = 4  # so many layers have one without a window
_PATTERN = "attention.sliding_window_pattern"


def afmoe(model: Gguf, metadata: GgufMetadata) -> Config:
    """Embeddings are always multiplied; of each four layers the last sees everything."""
    return {
        "model_type": "afmoe",
        **_experts(metadata, "route_scale"),
        "num_shared_experts": metadata.size("expert_shared_count"),
        "num_dense_layers": metadata.size("leading_dense_block_count"),
        "sliding_window": metadata.size("attention.sliding_window"),
        "layer_types": _kinds(metadata, _EVERY - 1),
        "mup_enabled": True,
    }


def laguna(model: Gguf, metadata: GgufMetadata) -> Config:
    """Of each four layers the first sees everything. How many gates a head has, the tensor tells that makes them."""
    window, heads, dim = metadata.size("attention.sliding_window", 0), query_heads(metadata), key_length(metadata)
    turning, base = metadata.size("rope.dimension_count", dim), metadata.number("rope.freq_base", 10_000.0)
    sliding = metadata.size("rope.dimension_count_swa", turning)
    gates = model.tensors.get("blk.0.attn_gate.weight")
    by_element = gates is not None and gates.shape[:1] == (heads[0] * dim,)
    return {
        "model_type": "laguna",
        **_experts(metadata, "moe_routed_scaling_factor"),
        "num_attention_heads_per_layer": heads,
        "shared_expert_intermediate_size": metadata.size("expert_shared_feed_forward_length"),
        "first_k_dense_replace": metadata.size("leading_dense_block_count"),
        "sliding_window": window or None,
        "layer_types": _kinds(metadata, 0) if window else None,
        "gating": "per-element" if by_element else "per-head",
        "rope_scaling": None,
        "partial_rotary_factor": None,
        "rope_parameters": {
            FULL: _rope(rope_scaling(model, metadata), base, turning / dim),
            SLIDING: _rope(None, metadata.number("rope.freq_base_swa", base), sliding / dim),
        },
    }


def mellum(model: Gguf, metadata: GgufMetadata) -> Config:
    """Of each four layers the last sees everything; the others have a rope that is not stretched."""
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=True)
    window, base = metadata.size("attention.sliding_window", 0), metadata.number("rope.freq_base", 10_000.0)
    return {
        "model_type": "mellum",
        **routed(metadata),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "sliding_window": window or None,
        "layer_types": _kinds(metadata, _EVERY - 1) if window else [FULL] * layer_count(metadata),
        "rope_scaling": None,
        "rope_parameters": {
            FULL: _rope(rope_scaling(model, metadata), base, 1.0),
            SLIDING: _rope(None, metadata.number("rope.freq_base_swa", base), 1.0),
        },
    }


def step35(model: Gguf, metadata: GgufMetadata) -> Config:
    """Lists have an item for each layer, those that predict further tokens among them. Where nothing slides, half of
    what a file says turns. Which layers are dense, their tensors tell.
    """
    heads, dim = query_heads(metadata), key_length(metadata)
    turning, base = metadata.size("rope.dimension_count", dim), metadata.number("rope.freq_base", 10_000.0)
    sliding = metadata.size("rope.dimension_count_swa", turning)
    bounds = [model.metadata.get(f"step35.swiglu_clamp_{which}") for which in ("exp", "shexp")]
    return {
        "model_type": "step3p5",
        **_experts(metadata, "moe_router_scaling_factor"),
        "share_expert_dim": metadata.size("expert_shared_feed_forward_length"),
        "per_layer_config": {str(layer): {"num_attention_heads": own} for layer, own in enumerate(heads)},
        "mlp_layer_types": [DENSE if has(model, "ffn_gate.weight", layer) else SPARSE for layer in range(len(heads))],
        "sliding_window": metadata.size("attention.sliding_window", 0) or None,
        "layer_types": _kinds(metadata, 0),
        "swiglu_limits": bounds[0],
        "swiglu_limits_shared": bounds[1],
        "rope_scaling": None,
        "partial_rotary_factor": None,
        "rope_parameters": {
            FULL: _rope(_fewer_factors(rope_scaling(model, metadata), turning // 4), base, turning / 2 / dim),
            SLIDING: _rope(None, metadata.number("rope.freq_base_swa", base), sliding / dim),
        },
    }


def _fewer_factors(scaling: Config | None, count: int) -> Config | None:
    """A file has factors for all dimensions of a head, though fewer turn where they are used."""
    if scaling is None or scaling["rope_type"] != "factors":
        return scaling
    return {**scaling, "factors": scaling["factors"][:count]}


def _experts(metadata: GgufMetadata, scale: str) -> Config:
    """scale: the name of the field for that of their weights."""
    require_gating(metadata, SIGMOID, SIGMOID)
    found = metadata.number("expert_weights_scale", 0.0) or 1.0
    require_weights(metadata, norm=True, scale=found)
    return {**routed(metadata), "moe_intermediate_size": metadata.size("expert_feed_forward_length"), scale: found}


def _kinds(metadata: GgufMetadata, without: int) -> list[str]:
    """Of every layer: as the file says, or in turn. without: which of those in a turn has no window."""
    count = layer_count(metadata)
    if metadata.has(_PATTERN) and metadata.is_list(_PATTERN):
        slides = metadata.layer_flags(_PATTERN, block_count(metadata))[:count]
    else:
        every = max(1, metadata.size(_PATTERN, _EVERY))
        slides = [layer % every != min(without, every - 1) for layer in range(count)]
    return [SLIDING if one else FULL for one in slides]


def _rope(scaling: Config | None, theta: float, part: float) -> Config:
    return {**(scaling or {"rope_type": "default"}), "rope_theta": theta, "partial_rotary_factor": part}
