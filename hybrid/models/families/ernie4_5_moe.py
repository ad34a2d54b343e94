"""ERNIE 4.5: interleaved rope, experts chosen by corrected softmax in a run of layers, shared experts as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    SHARED_EXPERTS,
    Defaults,
    read_attention,
    read_experts,
    read_layer_count,
    read_model,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, theta=500_000.0, kv_heads=4, tied=True, rope_interleaved=True)
NAMES = replace(
    SHARED_EXPERTS,
    correction="model.layers.{layer}.mlp.moe_statics.e_score_correction_bias",
    fused_correction="model.layers.{layer}.mlp.gate.moe_statics.e_score_correction_bias",
    correction_row=True,
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.refuse("use_bias", neutral=False)
    attention, experts = read_attention(fields, DEFAULTS), _experts(fields)
    plain = FeedForward(fields.size("intermediate_size"))
    layers = [LayerSpec(attention, experts if routed else plain) for routed in _routed(fields)]
    return read_model(fields, "ernie4_5_moe", layers, DEFAULTS)


def _routed(fields: Fields) -> list[bool]:
    """Which layers have experts: every `moe_layer_interval`-th from the first to the last that may."""
    count = read_layer_count(fields)
    first = fields.size("moe_layer_start_index", default=1, minimum=0)
    last = fields.size("moe_layer_end_index", default=-1, minimum=-1)
    step = fields.size("moe_layer_interval", default=1)
    return [(i + 1) % step == 0 and first <= i <= (count if last < 0 else last) for i in range(count)]


def _experts(fields: Fields) -> FeedForward:
    intermediate = fields.size("moe_intermediate_size")
    experts = read_experts(fields, intermediate, renormalise=True, names=NAMES)
    assert experts.router is not None
    shared = intermediate * fields.size("moe_num_shared_experts", default=2, minimum=0)
    return replace(experts, router=replace(experts.router, correction=True), shared_intermediate=shared)
