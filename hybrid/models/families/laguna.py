"""Laguna: layers with own numbers of query heads, gates on heads, windows and ropes; corrected sigmoids, one shared."""

from __future__ import annotations

import reprlib
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
    read_sparse_layers,
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
    fields.refuse("attention_bias", "qkv_bias", "swa_attention_sink_enabled", neutral=False)
    fields.number("rope_theta", default=1e4, above=1)  # whether or not others take its place
    window = None if fields.is_zero("sliding_window") else fields.optional_size("sliding_window", default=WINDOW)
    windows = read_windows(fields, window, default=[FULL] * read_layer_count(fields))
    config = _with_ropes(config)
    everything, sliding = _attention(config, FULL), replace(_attention(config, SLIDING), window=window)
    mixers = [sliding if one else everything for one in windows]
    mixers = [replace(one, heads=heads) for one, heads in zip(mixers, _heads(fields, everything), strict=True)]
    layers = [LayerSpec(*pair) for pair in zip(mixers, _halves(fields), strict=True)]
    return read_model(fields, "laguna", layers, DEFAULTS)


def _halves(fields: Fields) -> list[FeedForward]:
    """Of every layer: by name, or the numbers of dense ones are listed, or the first alone is dense."""
    fields.refuse("decoder_sparse_step", neutral=1)
    experts = _experts(fields)
    if fields.has("mlp_layer_types") or not fields.has("mlp_only_layers"):
        return read_named_layers(fields, experts)
    return read_sparse_layers(fields, experts)


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


def _with_ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a rope for each kind of layer: older ones have one for all, or that of windows apart."""
    fields, both = Fields(config), config.get("rope_parameters")
    if not isinstance(both, Mapping) or not both:
        fields.refuse("rope_scaling", "swa_rope_parameters")
        return {**config}
    fields.group("swa_rope_parameters")  # an object, if anything
    windows = config.get("swa_rope_parameters")
    if any(isinstance(both.get(kind), Mapping) for kind in ROPES):
        return {**config, "rope_parameters": {SLIDING: windows, **both}}
    part, ropes = config.get("partial_rotary_factor"), {FULL: both, SLIDING: windows or both}
    apart = {kind: {"partial_rotary_factor": part, **rope} for kind, rope in ropes.items()}
    return {**config, "rope_parameters": apart}


def _attention(config: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    """Each kind of layer has a rope of its own, which says how much of a head turns."""
    own = of_rope({**config, "partial_rotary_factor": None}, kind, ROPES[kind])
    attention = read_attention(Fields(own), DEFAULTS, qk_norm="head")
    return replace(attention, gate=HeadGate("softplus", per_head=_gating(config) == PER_HEAD, apart=True))


def _gating(config: Mapping[str, Any]) -> str:
    """The word for all layers; a list of those of each must say the same."""
    gating = PER_HEAD if config.get("gating") is True else config.get("gating")
    word = Fields({"gating": gating}).choice("gating", default=PER_HEAD, allowed=(PER_HEAD, PER_ELEMENT))
    own = config.get("gating_types")
    if own is not None and (not isinstance(own, list) or any(each != word.replace("-", "_") for each in own)):
        raise ConfigError(
            f"config.json: gating_types is {reprlib.repr(own)}, and gating {word}, which are not the same: correct one"
        )
    return word


def _experts(fields: Fields) -> FeedForward:
    fields.refuse("moe_apply_router_weight_on_input", neutral=False)
    fields.refuse("norm_topk_prob", "moe_router_use_sigmoid", neutral=True)
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
