"""Mistral: dense, without biases, and with one window for all layers unless config.json says null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, kv_heads=8)
WINDOW = 4096  # where config.json says nothing


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, window=fields.optional_size("sliding_window", default=WINDOW))
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size")))
    return read_model(fields, "mistral", [layer] * read_layer_count(fields), DEFAULTS)
