"""Qwen2: dense, biases on queries, keys and values. R1-Distill models have this architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_late_windows, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=32_768, kv_heads=32)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = replace(read_attention(fields, DEFAULTS, bias=True), out_bias=False)
    feed_forward = FeedForward(fields.size("intermediate_size"))
    layers = [LayerSpec(replace(attention, window=window), feed_forward) for window in read_late_windows(fields)]
    return read_model(fields, "qwen2", layers, DEFAULTS)
