"""Laguna: layers with own numbers of query heads, gates on heads, windows and ropes; corrected sigmoids, one shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import (
    FULL,
    SLIDING,
    Defaults,
    of_rope,
    read_attention,
    read_experts,
    read_layer_count,
    read_model,
    read_windows,
)
from hybrid.models.deepseek import read_named_layers
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.head_gate import HeadGate
from hybrid.models.layers.router import FeedForwardNames, Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import gated_names

DEFAULTS = Defaults(max_position=131_072, kv_heads=8, head_dim=128, rope_part=1.0)
WINDOW = 512  # where config.json says nothing
ROPES = {
    FULL: {"rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    SLIDING: {"rope_theta": 10_000.0},
}
HEADS = "num_attention_heads_per_layer"
PER_HEAD, PER_ELEMENT = "per-head", "per-element"  # words of `gating`; true is the first
_MLP = "model.layers.{layer}.mlp"
NAMES = FeedForwardNames(
    correction=f"{_MLP}.experts.e_score_correction_bias",
    shared=gated_names(f"{_MLP}.shared_expert"),
    fused_shared=gated_names(f"{_MLP}.shared_experts"),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    for name in ("attention_bias", "moe_apply_router_weight_on_input"):
        fields.refuse(name, neutral=False)
    fields.number("rope_theta", default=1e4, above=1)  # whether or not others take its place
    window = fields.optional_size("sliding_window", default=WINDOW)
    windows = read_windows(fields, window, default=[FULL] * read_layer_count(fields))
    everything, sliding = _attention(config, FULL), replace(_attention(config, SLIDING), window=window)
    mixers = [sliding if one else everything for one in windows]
    mixers = [replace(one, heads=heads) for one, heads in zip(mixers, _heads(fields, everything), strict=True)]
    layers = [LayerSpec(*pair) for pair in zip(mixers, read_named_layers(fields, _experts(fields)), strict=True)]
    return read_model(fields, "laguna", layers, DEFAULTS)


def _heads(fields: Fields, attention: GroupedQueryAttention) -> list[int]:
    """Query heads of every layer."""
    count, each = read_layer_count(fields), attention.kv_heads
    heads = fields.integers(HEADS) or [attention.heads] * count
    if len(heads) != count or any(own < 1 or own % each for own in heads):
        raise ConfigError(
            f"config.json: {HEADS} is {heads}; it must be a list of {count} multiples of num_key_value_heads {each}, "
            "one for each layer: correct it"
        )
    return heads


def _attention(config: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    """Each kind of layer has a rope of its own, which says how much of a head turns."""
    own = of_rope({**config, "partial_rotary_factor": None}, kind, ROPES[kind])
    attention = read_attention(Fields(own), DEFAULTS, qk_norm="head")
    gating = PER_HEAD if config.get("gating") is True else config.get("gating")
    word = Fields({"gating": gating}).choice("gating", default=PER_HEAD, allowed=(PER_HEAD, PER_ELEMENT))
    return replace(attention, gate=HeadGate("softplus", per_head=word == PER_HEAD, apart=True))


def _experts(fields: Fields) -> FeedForward:
    experts = read_experts(fields, fields.size("moe_intermediate_size"), renormalise=True, names=NAMES)
    assert experts.router is not None
    cap = "moe_router_logit_softcapping"
    router = Router(
        experts.router.top_k,
        "sigmoid",
        correction=True,
        scale=fields.number("moe_routed_scaling_factor", default=1.0),
        logit_cap=fields.number(cap) if fields.has(cap) and not fields.is_zero(cap) else 0.0,
    )
    return replace(
        experts, router=router, shared_intermediate=fields.size("shared_expert_intermediate_size", default=512)
    )
