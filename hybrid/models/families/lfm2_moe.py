"""LFM2 with experts: the mixers of LFM2, experts chosen by corrected sigmoids behind the first layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import read_experts, read_first_dense, read_model
from hybrid.models.families.lfm2 import DEFAULTS, FEED_FORWARD, OUTER, read_mixers
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.router import Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import GatedNames

_MOE = "model.layers.{layer}.feed_forward"
NAMES = replace(
    FEED_FORWARD,
    router=f"{_MOE}.gate.weight",
    fused_router=f"{_MOE}.gate.weight",
    correction=f"{_MOE}.expert_bias",
    fused_correction=f"{_MOE}.expert_bias",
    experts=GatedNames(
        f"{_MOE}.experts.{{expert}}.w1.weight",
        f"{_MOE}.experts.{{expert}}.w3.weight",
        f"{_MOE}.experts.{{expert}}.w2.weight",
        f"{_MOE}.experts.gate_up_proj",
        f"{_MOE}.experts.down_proj",
    ),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    halves = read_first_dense(fields, _experts(fields), name="num_dense_layers", default=2)
    layers = [LayerSpec(*pair) for pair in zip(read_mixers(fields), halves, strict=True)]
    return read_model(fields, "lfm2_moe", layers, DEFAULTS, OUTER)


def _experts(fields: Fields) -> FeedForward:
    renormalise = fields.flag("norm_topk_prob", default=True)
    experts = read_experts(fields, fields.size("moe_intermediate_size"), renormalise=renormalise, names=NAMES)
    assert experts.router is not None
    scale, correction = (
        fields.number("routed_scaling_factor", default=1.0),
        fields.flag("use_expert_bias", default=True),
    )
    router = Router(experts.router.top_k, "sigmoid", renormalise=renormalise, scale=scale, correction=correction)
    return replace(experts, router=router)
