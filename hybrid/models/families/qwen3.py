"""Qwen3: dense, RMSNorm on every query and key head before rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    FULL,
    SLIDING,
    Defaults,
    read_attention,
    read_layer_count,
    read_model,
    read_windows,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=32_768, kv_heads=32, head_dim=128)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
    feed_forward = FeedForward(fields.size("intermediate_size"))
    layers = [LayerSpec(replace(attention, window=window), feed_forward) for window in _windows(fields)]
    return read_model(fields, "qwen3", layers, DEFAULTS)


def _windows(fields: Fields) -> list[int | None]:
    """Each layer's window: named by `layer_types`, or else the layers from `max_window_layers` on slide."""
    window = fields.optional_size("sliding_window", default=4096) if fields.flag("use_sliding_window") else None
    first = fields.size("max_window_layers", default=28, minimum=0) if window else read_layer_count(fields)
    default = [SLIDING if layer >= first else FULL for layer in range(read_layer_count(fields))]
    return read_windows(fields, window, default=default)
