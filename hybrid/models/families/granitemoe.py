"""Granite 3 MoE: four multipliers, a softmax over the chosen experts, experts stacked in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_experts, read_layer_count, read_model
from hybrid.models.layers.router import FeedForwardNames, Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import GatedNames

DEFAULTS = Defaults(max_position=2048)
_MOE = "model.layers.{layer}.block_sparse_moe"
NAMES = FeedForwardNames(
    router=f"{_MOE}.router.layer.weight",
    fused_router=f"{_MOE}.router.layer.weight",
    experts=GatedNames("", "", "", f"{_MOE}.input_linear.weight", f"{_MOE}.output_linear.weight"),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The multiplier of what experts add to the residual stream is one of their weights in the sum."""
    fields = Fields(config)
    added = fields.number("residual_multiplier", default=1.0)
    attention = replace(
        read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias")),
        scale=fields.number("attention_multiplier", default=1.0),
        out_scale=added,
    )
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=True, names=NAMES)
    assert experts.router is not None
    router = Router(experts.router.top_k, "topk_softmax", scale=added)
    layer = LayerSpec(attention, replace(experts, router=router))
    model = read_model(fields, "granitemoe", [layer] * read_layer_count(fields), DEFAULTS)
    return replace(
        model,
        embedding_scale=fields.number("embedding_multiplier", default=1.0),
        logit_scale=1 / fields.number("logits_scaling", default=1.0),
    )
