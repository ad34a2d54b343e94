"""Command R and R+: dense, a feed-forward beside attention, LayerNorms without a bias, a scale of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.cohere import DEFAULTS, NAMES, read_cohere
from hybrid.models.decoder import read_attention, read_layer_count
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query_shape import QkNorm
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Command R+ norms each head of queries and keys."""
    fields, defaults = Fields(config), replace(DEFAULTS, theta=500_000.0)
    norm: QkNorm = "apart" if fields.flag("use_qk_norm") else "none"
    attention = read_attention(fields, defaults, qk_norm=norm, bias=fields.flag("attention_bias"))
    halves = attention, FeedForward(fields.size("intermediate_size"), names=NAMES)
    return read_cohere(fields, "cohere", [halves] * read_layer_count(fields), defaults)
