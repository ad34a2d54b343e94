"""Layers whose halves read the residual stream as it is, and are normed before they are added to it."""

from __future__ import annotations

from hybrid.models.layers.grouped_query import GroupedQueryNames
from hybrid.models.layers.router import FeedForwardNames

_LAYER = "model.layers.{layer}"
ATTENTION = GroupedQueryNames(norm="", post_norm=f"{_LAYER}.post_attention_layernorm.weight")
FEED_FORWARD = FeedForwardNames(norm="", post_norm=f"{_LAYER}.post_feedforward_layernorm.weight")
