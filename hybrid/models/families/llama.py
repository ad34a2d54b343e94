"""Llama 2 and 3, and the models that share their architecture: dense, no norm on queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=2048)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias"))
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size"), bias=fields.flag("mlp_bias")))
    return read_model(fields, "llama", [layer] * read_layer_count(fields), DEFAULTS)
