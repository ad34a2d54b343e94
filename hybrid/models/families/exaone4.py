"""EXAONE 4: dense, norms behind each half of a layer and on heads; beside windows, layers without one have no rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import FULL, SLIDING, Defaults, read_attention, read_layer_count, read_model, read_windows
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.norm_after import ATTENTION, FEED_FORWARD
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=2048, eps=1e-5, kv_heads=32)
WINDOW, EVERY = 4096, 4  # where config.json says nothing


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = replace(read_attention(fields, DEFAULTS, qk_norm="head"), names=ATTENTION)
    feed_forward = FeedForward(fields.size("intermediate_size"), names=FEED_FORWARD)
    layers = [LayerSpec(mixer, feed_forward) for mixer in read_turned_windows(fields, attention)]
    return read_model(fields, "exaone4", layers, DEFAULTS)


def read_turned_windows(fields: Fields, attention: GroupedQueryAttention) -> list[GroupedQueryAttention]:
    """The attention of every layer: with a window and rope, or where others have a window, without either."""
    window = fields.optional_size("sliding_window", default=WINDOW)
    return [
        replace(attention, window=one, rope=attention.rope if one or not window else None)
        for one in read_windows(fields, window, default=_default_kinds(fields, window))
    ]


def _default_kinds(fields: Fields, window: int | None) -> list[str]:
    """Every fourth layer, or as many as `sliding_window_pattern` says, sees everything; a text such as LLLG stands
    beside `layer_types`, which says the same.
    """
    count = read_layer_count(fields)
    if window is None or fields.has("layer_types"):
        return [FULL] * count
    every = fields.size("sliding_window_pattern", default=EVERY)
    return [SLIDING if (layer + 1) % every else FULL for layer in range(count)]
