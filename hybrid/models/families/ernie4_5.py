"""ERNIE 4.5, dense: Llama with interleaved rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(
    max_position=131_072, eps=1e-5, theta=500_000.0, kv_heads=2, head_dim=128, tied=True, rope_interleaved=True
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    bias = fields.flag("use_bias")
    layer = LayerSpec(
        read_attention(fields, DEFAULTS, bias=bias), FeedForward(fields.size("intermediate_size"), bias=bias)
    )
    return read_model(fields, "ernie4_5", [layer] * read_layer_count(fields), DEFAULTS)
