"""Trinity: gates on heads, windows with rope and layers without either, norms around each half, corrected sigmoids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

from hybrid.models.decoder import (
    FULL,
    SHARED_EXPERTS,
    SLIDING,
    Defaults,
    read_attention,
    read_experts,
    read_first_dense,
    read_layer_count,
    read_model,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention, GroupedQueryNames
from hybrid.models.layers.head_gate import HeadGate
from hybrid.models.layers.router import Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=16_384, eps=1e-5, head_dim=128)
WINDOW, EVERY = 1024, 4  # where config.json says nothing
_LAYER = "model.layers.{layer}"
_MLP = f"{_LAYER}.mlp"
ATTENTION = GroupedQueryNames(
    post_norm=f"{_LAYER}.post_attention_layernorm.weight", gate=f"{_LAYER}.self_attn.gate_proj.weight"
)
NAMES = replace(
    SHARED_EXPERTS,
    norm=f"{_LAYER}.pre_mlp_layernorm.weight",
    post_norm=f"{_LAYER}.post_mlp_layernorm.weight",
    router=f"{_MLP}.router.gate.weight",
    fused_router=f"{_MLP}.router.gate.weight",
    correction=f"{_MLP}.expert_bias",
    fused_correction=f"{_MLP}.expert_bias",
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.refuse("attention_bias", neutral=False)  # which no published model has
    halves = read_first_dense(fields, _experts(fields), name="num_dense_layers")
    layers = [LayerSpec(*pair) for pair in zip(_attention(fields), halves, strict=True)]
    model = read_model(fields, "afmoe", layers, DEFAULTS)
    return replace(model, embedding_scale=sqrt(model.hidden)) if fields.flag("mup_enabled") else model


def _attention(fields: Fields) -> list[GroupedQueryAttention]:
    """Of every layer: with a window and rope, or without either."""
    every, count = fields.size("global_attn_every_n_layers", default=EVERY), read_layer_count(fields)
    default = [SLIDING if (layer + 1) % every else FULL for layer in range(count)]
    kinds = fields.choices("layer_types", default=default, allowed=(FULL, SLIDING))
    whole = read_attention(fields, DEFAULTS, qk_norm="head")
    sliding = replace(
        whole, window=fields.size("sliding_window", default=WINDOW), gate=HeadGate(apart=True), names=ATTENTION
    )
    return [sliding if kind == SLIDING else replace(sliding, window=None, rope=None) for kind in kinds]


def _experts(fields: Fields) -> FeedForward:
    fields.choice("score_func", default="sigmoid", allowed=("sigmoid",))
    fields.refuse("route_norm", neutral=True)
    fields.refuse("n_group", "topk_group", "num_expert_groups", "num_limited_groups", neutral=1)
    intermediate = fields.size("moe_intermediate_size")
    experts = read_experts(fields, intermediate, renormalise=True, names=NAMES)
    assert experts.router is not None
    scale = fields.number("route_scale", default=1.0)
    router = Router(experts.router.top_k, "sigmoid", scale=scale, correction=True)
    shared = intermediate * fields.size("num_shared_experts", default=2)
    return replace(experts, router=router, shared_intermediate=shared)
