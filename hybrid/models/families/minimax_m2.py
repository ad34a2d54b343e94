"""MiniMax-M2: part of each head turns, one norm over all heads, a sigmoid router with corrections; names of Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    MIXTRAL_NAMES,
    Defaults,
    read_attention,
    read_experts,
    read_grouped_sigmoid,
    read_head_dim,
    read_layer_count,
    read_model,
)
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=196_608, theta=5e6, kv_heads=8, head_dim=128, rope_part=1.0)
NAMES = replace(
    MIXTRAL_NAMES,
    correction="model.layers.{layer}.block_sparse_moe.e_score_correction_bias",
    fused_correction="model.layers.{layer}.mlp.e_score_correction_bias",
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    if fields.has("rotary_dim") and not fields.has("partial_rotary_factor"):
        turning = fields.size("rotary_dim") / read_head_dim(fields, DEFAULTS)
        fields = Fields({**config, "partial_rotary_factor": turning})
    attention = read_attention(fields, DEFAULTS, qk_norm="whole")
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=True, names=NAMES)
    for name in ("n_group", "topk_group", "routed_scaling_factor"):
        fields.refuse(name, neutral=1)
    layer = LayerSpec(attention, read_grouped_sigmoid(fields, experts, scale=1.0))
    return read_model(fields, "minimax_m2", [layer] * read_layer_count(fields), DEFAULTS)
