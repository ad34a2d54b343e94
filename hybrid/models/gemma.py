"""What Gemma 3 and 4 share: the names of their norms, and bounds of logits."""

from __future__ import annotations

from hybrid.models.layers.grouped_query import GroupedQueryNames
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.reading import Fields

_LAYER = "model.layers.{layer}"
ATTENTION = GroupedQueryNames(post_norm=f"{_LAYER}.post_attention_layernorm.weight")
FEED_FORWARD = FeedForwardNames(
    norm=f"{_LAYER}.pre_feedforward_layernorm.weight", post_norm=f"{_LAYER}.post_feedforward_layernorm.weight"
)


def read_logit_cap(fields: Fields) -> float | None:
    return fields.number("final_logit_softcapping") if fields.has("final_logit_softcapping") else None
