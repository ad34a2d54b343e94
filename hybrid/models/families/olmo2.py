"""OLMo 2: dense, norms behind each half of a layer alone, one over all heads of queries, one over those of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.norm_after import ATTENTION, FEED_FORWARD
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=2048, eps=1e-5)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    layer = LayerSpec(read_normed_attention(fields, DEFAULTS), read_feed_forward(fields))
    return read_model(fields, "olmo2", [layer] * read_layer_count(fields), DEFAULTS)


def read_normed_attention(fields: Fields, defaults: Defaults) -> GroupedQueryAttention:
    attention = read_attention(fields, defaults, qk_norm="whole", bias=fields.flag("attention_bias"))
    return replace(attention, names=ATTENTION)


def read_feed_forward(fields: Fields) -> FeedForward:
    return FeedForward(fields.size("intermediate_size"), names=FEED_FORWARD)
