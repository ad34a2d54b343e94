"""Hunyuan 3: norms on heads, experts chosen by corrected sigmoids, a shared expert, first layers dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import SHARED_EXPERTS, Defaults, read_attention, read_experts, read_model
from hybrid.models.deepseek import read_named_layers
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.router import Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import gated_names

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, theta=11_158_840.0, kv_heads=8, head_dim=128)
_MLP = "model.layers.{layer}.mlp"
NAMES = replace(
    SHARED_EXPERTS,
    router=f"{_MLP}.router.gate.weight",
    correction=f"{_MLP}.expert_bias",
    fused_correction=f"{_MLP}.e_score_correction_bias",
    shared=gated_names(f"{_MLP}.shared_mlp"),
    fused_shared=gated_names(f"{_MLP}.shared_experts"),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.refuse("mlp_bias", neutral=False)
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
    layers = [LayerSpec(attention, half) for half in read_named_layers(fields, _experts(fields))]
    return read_model(fields, "hy_v3", layers, DEFAULTS)


def _experts(fields: Fields) -> FeedForward:
    intermediate = fields.size("moe_intermediate_size")
    experts = read_experts(fields, intermediate, renormalise=True, names=NAMES)
    assert experts.router is not None
    scale = fields.number("router_scaling_factor", default=2.826)
    router = Router(experts.router.top_k, "sigmoid", scale=scale, correction=True)
    return replace(
        experts, router=router, shared_intermediate=intermediate * fields.size("num_shared_experts", default=1)
    )
