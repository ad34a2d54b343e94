"""GLM-4.7-Flash: latent attention, and the router and experts of GLM-4.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_first_dense, read_model
from hybrid.models.deepseek import read_latent_attention, read_sigmoid_experts
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=202_752, eps=1e-5)
DENSE, SPARSE = "dense", "sparse"  # words of `mlp_layer_types`


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_latent_attention(fields, DEFAULTS, q_rank=768, nope_dim=192, value_dim=256)
    layers = [LayerSpec(attention, feed_forward) for feed_forward in _feed_forwards(fields)]
    return read_model(fields, "glm4_moe_lite", layers, DEFAULTS)


def _feed_forwards(fields: Fields) -> list[FeedForward]:
    """Of every layer: by name, or the first few are dense."""
    experts, plain = read_sigmoid_experts(fields, scale=1.8), FeedForward(fields.size("intermediate_size"))
    default = [SPARSE if half.is_moe else DENSE for half in read_first_dense(fields, experts)]
    kinds = fields.choices("mlp_layer_types", default=default, allowed=(DENSE, SPARSE))
    return [experts if kind == SPARSE else plain for kind in kinds]
