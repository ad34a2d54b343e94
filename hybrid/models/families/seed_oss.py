"""Seed-OSS: dense, biases on queries, keys and values, and on what attention puts out if that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=524_288, kv_heads=8, head_dim=128)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias", default=True))
    attention = replace(attention, out_bias=fields.flag("attention_out_bias"))
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size"), bias=fields.flag("mlp_bias")))
    return read_model(fields, "seed_oss", [layer] * read_layer_count(fields), DEFAULTS)
