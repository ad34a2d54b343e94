"""Gemma's models in GGUF files."""

from __future__ import annotations

from hybrid.errors import WeightsError
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
from hybrid.weights.checkpoints.gguf_rope import ROPE_FACTORS, Config, rope_factors

_GEMMA2_27B, _GEMMA3_27B = 46, 62  # layers of those models
_GEMMA3_PATTERN = 6  # in all of Gemma 3 every 6th sees everything
_STILL = 1e20  # factors from there on stop a frequency


def gemma2(model: Gguf, metadata: GgufMetadata) -> Config:
    """Files do not say what scales scores: of the largest model it is another number. Bounds that are missing are those
    of the published models.
    """
    return {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _shared(metadata) if layer_count(metadata) == _GEMMA2_27B else key_length(metadata),
        "sliding_window": metadata.size("attention.sliding_window", 0) or None,
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 0.0) or None,
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 0.0) or None,
    }


def _shared(metadata: GgufMetadata) -> int:
    """A head's part of the hidden size."""
    return metadata.size("embedding_length") // max(1, metadata.size("attention.head_count"))


def gemma3(model: Gguf, metadata: GgufMetadata) -> Config:
    """Files say neither which layers slide nor what scales scores: of the largest model it is another number."""
    return {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _shared(metadata) if layer_count(metadata) == _GEMMA3_27B else key_length(metadata),
        "sliding_window": metadata.size("attention.sliding_window", 0) or None,
        "sliding_window_pattern": metadata.size("attention.sliding_window_pattern", _GEMMA3_PATTERN),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 0.0) or None,
    }


def gemma4(model: Gguf, metadata: GgufMetadata) -> Config:
    """Sizes with `_swa` are those of layers that slide, the same without it those of the others."""
    slides = metadata.layer_flags("attention.sliding_window_pattern", layer_count(metadata))
    heads = metadata.layer_sizes("attention.head_count_kv", layer_count(metadata))
    sliding, everything = _of_kind(metadata, heads, slides, True), _of_kind(metadata, heads, slides, False)
    shared = not has(model, "attn_v.weight", slides.index(False)) if False in slides else False
    found = {
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention" if one else "full_attention" for one in slides],
        "head_dim": metadata.size("attention.key_length_swa"),
        "num_key_value_heads": sliding,
        "global_head_dim": metadata.size("attention.key_length"),
        "num_global_key_value_heads": everything if shared else None,
        "attention_k_eq_v": shared,
        "sliding_window": metadata.size("attention.sliding_window"),
        "hidden_size_per_layer_input": metadata.size("embedding_length_per_layer_input", 0),
        "num_kv_shared_layers": metadata.size("attention.shared_kv_layers", 0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 0.0) or None,
        "rope_scaling": None,
        "partial_rotary_factor": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 1e4)},
            "full_attention": {**_turning(model), "rope_theta": metadata.number("rope.freq_base", 1e6)},
        },
    }
    return {**found, **_parallel(metadata)} if metadata.size("expert_count", 0) else found


def _of_kind(metadata: GgufMetadata, heads: list[int], slides: list[bool], kind: bool) -> int:
    """How many heads of keys the layers of one kind have."""
    found = {count for count, one in zip(heads, slides, strict=True) if one == kind}
    if len(found) > 1:
        raise metadata.refuse(
            "attention.head_count_kv", heads, "the same for all layers that slide, and for all others"
        )
    return found.pop() if found else heads[0]


def _turning(model: Gguf) -> Config:
    """The part of a head that turns: the rest has factors that leave its frequencies nothing."""
    factors = rope_factors(model, ROPE_FACTORS)
    count = sum(factor == 1.0 for factor in factors)
    if factors[:count] != [1.0] * count or not all(factor >= _STILL for factor in factors[count:]):
        raise WeightsError(
            f"{model.path}: tensor {ROPE_FACTORS} must be 1 where a head turns, and from {_STILL:g} on behind that: "
            "take another copy of the model"
        )
    part = count / len(factors) if factors else 1.0
    return {"rope_type": "proportional", "partial_rotary_factor": part}


def _parallel(metadata: GgufMetadata) -> Config:
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=True)
    found = routed(metadata)
    return {
        "enable_moe_block": True,
        "num_experts": found["num_experts"],
        "top_k_experts": found["num_experts_per_tok"],
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
    }
