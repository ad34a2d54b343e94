"""Gemma's models in GGUF files."""

from __future__ import annotations

from hybrid.weights.checkpoints.gguf_fields import key_length, layer_count
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config

_GEMMA3_27B, _GEMMA3_PATTERN = 62, 6  # layers of that model; in all of them every 6th sees everything


def gemma3(model: Gguf, metadata: GgufMetadata) -> Config:
    """Files say neither which layers slide nor what scales scores: of the largest model it is another number."""
    shared = metadata.size("embedding_length") // max(1, metadata.size("attention.head_count"))
    return {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": shared if layer_count(metadata) == _GEMMA3_27B else key_length(metadata),
        "sliding_window": metadata.size("attention.sliding_window", 0) or None,
        "sliding_window_pattern": metadata.size("attention.sliding_window_pattern", _GEMMA3_PATTERN),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 0.0) or None,
    }
