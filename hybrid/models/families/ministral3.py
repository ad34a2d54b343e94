"""Ministral 3: Mistral without a window, in which late queries are larger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model, with_rope
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=262_144, eps=1e-5, kv_heads=8, head_dim=128, rope_grows=True)
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(with_rope(config, ROPE))
    attention = read_attention(fields, DEFAULTS, window=fields.optional_size("sliding_window"))
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size")))
    return read_model(fields, "ministral3", [layer] * read_layer_count(fields), DEFAULTS)
