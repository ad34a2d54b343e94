"""What Gemma 3 and 4 share: the names of their norms, and ropes by the kind of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def of_rope(config: Mapping[str, Any], kind: str, default: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the rope of one kind of layer alone, or a default."""
    rest = {name: value for name, value in config.items() if not name.startswith("rope_")}
    both = config.get("rope_parameters")
    own = both.get(kind) if isinstance(both, Mapping) else None
    return {**rest, "rope_parameters": default if own is None else own}
