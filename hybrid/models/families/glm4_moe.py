"""GLM-4.5 to 4.7: half of each head turns, a sigmoid router with corrections, a shared expert, first layers dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    SHARED_EXPERTS,
    Defaults,
    read_attention,
    read_experts,
    read_first_dense,
    read_grouped_sigmoid,
    read_model,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query_shape import QkNorm
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, kv_heads=8, rope_part=0.5)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    norm: QkNorm = "head" if fields.flag("use_qk_norm") else "none"
    attention = read_attention(fields, DEFAULTS, qk_norm=norm, bias=fields.flag("attention_bias"))
    attention = replace(attention, out_bias=False)
    layers = [LayerSpec(attention, feed_forward) for feed_forward in read_first_dense(fields, read_glm_experts(fields))]
    return read_model(fields, "glm4_moe", layers, DEFAULTS)


def read_glm_experts(fields: Fields) -> FeedForward:
    """Experts chosen by corrected sigmoids, and the shared one."""
    intermediate, renormalise = fields.size("moe_intermediate_size"), fields.flag("norm_topk_prob", default=True)
    experts = read_experts(fields, intermediate, renormalise=renormalise, names=SHARED_EXPERTS)
    experts = read_grouped_sigmoid(fields, experts, scale=1.0)
    return replace(experts, shared_intermediate=intermediate * fields.size("n_shared_experts", default=1))
