"""Ministral: Mistral in which `layer_types` may say that some layers have no window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import FULL, SLIDING, read_attention, read_layer_count, read_model, read_windows
from hybrid.models.families.mistral import DEFAULTS, WINDOW
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    window = fields.optional_size("sliding_window", default=WINDOW)
    default = [SLIDING if window else FULL] * read_layer_count(fields)
    attention, feed_forward = read_attention(fields, DEFAULTS), FeedForward(fields.size("intermediate_size"))
    layers = [
        LayerSpec(replace(attention, window=window), feed_forward)
        for window in read_windows(fields, window, default=default)
    ]
    return read_model(fields, "ministral", layers, DEFAULTS)
