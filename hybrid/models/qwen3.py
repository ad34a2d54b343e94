"""Qwen3: dense, RMSNorm on every query and key head before rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.reading import Fields
from hybrid.models.spec import FeedForwardSpec, LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=32_768, kv_heads=32, head_dim=128)
_FULL, _SLIDING = "full_attention", "sliding_attention"


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
    feed_forward = FeedForwardSpec(fields.size("intermediate_size"))
    layers = [LayerSpec(replace(attention, window=window), feed_forward) for window in _windows(fields)]
    return read_model(fields, "qwen3", layers, DEFAULTS)


def _windows(fields: Fields) -> list[int | None]:
    """Each layer's window: named by `layer_types`, or else the layers from `max_window_layers` on slide."""
    window = fields.optional_size("sliding_window", default=4096) if fields.flag("use_sliding_window") else None
    first = fields.size("max_window_layers", default=28, minimum=0) if window else read_layer_count(fields)
    default = [_SLIDING if layer >= first else _FULL for layer in range(read_layer_count(fields))]
    kinds = fields.choices("layer_types", default=default, allowed=(_FULL, _SLIDING) if window else (_FULL,))
    return [window if kind == _SLIDING else None for kind in kinds]
