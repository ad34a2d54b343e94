"""DeepSeek-V2 and V2-Lite: latent attention, a softmax router with groups or without, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_first_dense, read_groups, read_model
from hybrid.models.deepseek import read_latent_attention, read_shared
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=2048)
GREEDY, GROUPED = "greedy", "group_limited_greedy"  # words of `topk_method`


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.refuse("mlp_bias", neutral=False)
    fields.refuse("rope_interleave", neutral=True)
    attention = read_latent_attention(fields, DEFAULTS, q_rank=1536, nope_dim=128, value_dim=128)
    layers = [LayerSpec(attention, half) for half in read_first_dense(fields, _experts(fields), default=0)]
    return read_model(fields, "deepseek_v2", layers, DEFAULTS)


def _experts(fields: Fields) -> FeedForward:
    """`transformers` and the code beside the weights differ in what renormalised weights are scaled by: so none are."""
    fields.choice("scoring_func", default="softmax", allowed=("softmax",))
    fields.refuse("norm_topk_prob", neutral=False)
    experts = read_shared(fields, renormalise=False, shared=2)
    if fields.choice("topk_method", default=GREEDY, allowed=(GREEDY, GROUPED)) == GROUPED:
        experts = read_groups(fields, experts)
    assert experts.router is not None
    return replace(experts, router=replace(experts.router, scale=fields.number("routed_scaling_factor", default=1.0)))
