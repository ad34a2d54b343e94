"""GLM-4 and GLM-Edge: dense; half of each head turns, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import read_attention, read_layer_count, read_model
from hybrid.models.families import glm4
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

FEED_FORWARD = replace(glm4.FEED_FORWARD, post_norm="")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, glm4.DEFAULTS, bias=fields.flag("attention_bias", default=True))
    attention = replace(attention, out_bias=False)
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size"), names=FEED_FORWARD))
    return read_model(fields, "glm", [layer] * read_layer_count(fields), glm4.DEFAULTS)
