"""GLM-4.7-Flash: latent attention, and the router and experts of GLM-4.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_model
from hybrid.models.deepseek import read_latent_attention, read_named_layers, read_sigmoid_experts
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=202_752, eps=1e-5)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_latent_attention(fields, DEFAULTS, q_rank=768, nope_dim=192, value_dim=256)
    halves = read_named_layers(fields, read_sigmoid_experts(fields, scale=1.8))
    layers = [LayerSpec(attention, feed_forward) for feed_forward in halves]
    return read_model(fields, "glm4_moe_lite", layers, DEFAULTS)
