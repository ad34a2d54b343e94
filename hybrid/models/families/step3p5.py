"""Step-3.5-Flash: layers with a window have more query heads and another rope; gates on heads, bounds by layer.

Layers for the prediction of further tokens, which a checkpoint has behind its last one, are not used: lists of
numbers for each layer may be as much longer.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import (
    FULL,
    SHARED_EXPERTS,
    SLIDING,
    Defaults,
    of_rope,
    read_attention,
    read_experts,
    read_layer_count,
    read_model,
    read_windows,
)
from hybrid.models.deepseek import DENSE, SPARSE
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.head_gate import HeadGate
from hybrid.models.layers.router import Router
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=128_000, eps=1e-5, kv_heads=8, head_dim=128, rope_part=1.0)
THETA = 10_000.0
WORDS = {  # of the published configuration
    "num_attention_groups": "num_key_value_heads",
    "moe_num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "moe_top_k": "num_experts_per_tok",
    "share_expert_dims": "share_expert_dim",
}
FIRST_SPARSE = 3  # layer with experts, where nothing says which have them
_NUMBER = re.compile(r"\d{0,6}")
NAMES = replace(SHARED_EXPERTS, experts=replace(SHARED_EXPERTS.experts, stacked=True))


def spec(config: Mapping[str, Any]) -> ModelSpec:
    config = with_words(config, WORDS)
    count = read_layer_count(Fields(config))
    fields = Fields(config).spelled_out("layer_types", {}, count).spelled_out("mlp_layer_types", {}, count)
    _refuse_others(fields, config)
    windows = read_windows(fields, fields.optional_size("sliding_window"), default=[FULL] * count)
    kinds = [SLIDING if window else FULL for window in windows]
    config = _without_incomplete_ropes(config, kinds)
    mixers = [_attention(config, *layer) for layer in zip(range(count), kinds, windows, strict=True)]
    mixers = [replace(mixer, heads=heads) for mixer, heads in zip(mixers, _heads(config, mixers), strict=True)]
    layers = [LayerSpec(*pair) for pair in zip(mixers, _halves(config, fields, count), strict=True)]
    return replace(read_model(fields, "step3p5", layers, DEFAULTS), norm="rms_less_one")


def _refuse_others(fields: Fields, config: Mapping[str, Any]) -> None:
    """What models of this family could have been, and were not published as."""
    fields.refuse("attention_bias", "mlp_bias", "sink", "use_bidirectional_attention", neutral=False)
    fields.refuse("use_head_wise_attn_gate", "use_moe", "use_qk_norm", "zero_centered", neutral=True)
    fields.refuse("norm_expert_weight", "use_moe_router_bias", neutral=True)
    fields.refuse("yarn_only_types", neutral=[FULL])
    fields.choice("moe_router_activation", default="sigmoid", allowed=("sigmoid",))
    fields.choice("att_impl_type", default="GQA", allowed=("GQA",))
    if not isinstance(config.get("rope_theta"), list):  # of layers; it is read whether or not others take its place
        fields.number("rope_theta", default=THETA, above=1)
    if config.get("gating") is not True:
        fields.choice("gating", default="per-head", allowed=("per-head",))
    turning = config.get("use_rope_layers") or []
    if not isinstance(turning, list) or not all(one in (True,) for one in turning):
        raise ConfigError(
            f"config.json: use_rope_layers is {reprlib.repr(turning)}; it must be absent, or a list of true for every "
            "layer: correct it, or take a checkpoint that has it so"
        )


def _attention(config: Mapping[str, Any], layer: int, kind: str, window: int | None) -> GroupedQueryAttention:
    """Of one layer, with the query heads of layers without a window."""
    fields = Fields(_with_rope(config, layer, kind))
    attention = read_attention(fields, DEFAULTS, qk_norm="head", window=window)
    size = fields.number("query_pre_attn_scalar", default=attention.head_dim)
    scale = None if size == attention.head_dim else size**-0.5
    return replace(attention, scale=scale, gate=HeadGate(per_head=True, apart=True))


def _without_incomplete_ropes(config: Mapping[str, Any], kinds: Sequence[str]) -> Mapping[str, Any]:
    """The configuration, in which lists tell the ropes unless there is one for every kind of layer, as `transformers`
    reads it.
    """
    ropes = config.get("rope_parameters")
    if not isinstance(ropes, Mapping) or all(isinstance(ropes.get(kind), Mapping) for kind in kinds):
        return config
    return {**config, "rope_parameters": None}


def _with_rope(config: Mapping[str, Any], layer: int, kind: str) -> dict[str, Any]:
    """The configuration with the rope of one layer: that of its kind, or what lists say of it. Where these do, layers
    with a window have one that is not stretched.
    """
    if config.get("rope_parameters") is not None:
        return of_rope({**config, "partial_rotary_factor": None}, kind, {"rope_theta": THETA})
    Fields(config).group("rope_scaling")  # an object, if anything
    rope = dict(config.get("rope_scaling") or {}) if kind == FULL else {}
    rope |= {"rope_theta": _of_layer(config, "rope_theta", layer, THETA)}
    rope |= {"partial_rotary_factor": _of_layer(config, "partial_rotary_factors", layer, 1.0)}
    return of_rope({**config, "rope_parameters": {kind: rope}}, kind, {})


def _of_layer(config: Mapping[str, Any], name: str, layer: int, default: float) -> Any:
    """What a list has for a layer, or one number for all."""
    found = config.get(name)
    if not isinstance(found, list):
        return default if found is None else found
    if layer < len(found):
        return found[layer]
    raise ConfigError(
        f"config.json: {name} is {reprlib.repr(found)}, which has no number for layer {layer}; it must be a number, or "
        "a list with one for each layer: correct it"
    )


def _heads(config: Mapping[str, Any], mixers: Sequence[GroupedQueryAttention]) -> list[int]:
    """Query heads of every layer: as `transformers` saves them, or those of all layers with a window are others."""
    usual, sliding = mixers[0].heads, _sliding_heads(Fields(config), mixers[0])
    own, found = config.get("per_layer_config"), list[int]()
    for layer, mixer in enumerate(mixers):
        heads = sliding if mixer.window else usual
        if own is not None:
            heads = _saved_heads(own, layer, usual)
        if heads % mixer.kv_heads:
            raise ConfigError(
                f"config.json: layer {layer} has {heads} query heads, which is no multiple of num_key_value_heads "
                f"{mixer.kv_heads}: correct num_attention_heads, num_sliding_attention_heads or per_layer_config"
            )
        found.append(heads)
    return found


def _sliding_heads(fields: Fields, attention: GroupedQueryAttention) -> int:
    """Of layers with a window, of which a published configuration has the sizes apart."""
    name, other = "num_attention_heads", fields.group("attention_other_setting")
    other.choice("attention_type", default=SLIDING, allowed=(SLIDING,))
    other.refuse("num_attention_groups", neutral=attention.kv_heads)
    other.refuse("head_dim", "true_head_dim", neutral=attention.head_dim)
    return fields.size("num_sliding_attention_heads", default=other.size(name, default=attention.heads))


def _saved_heads(own: Any, layer: int, usual: int) -> int:
    name = "num_attention_heads"
    found = own.get(str(layer), {}) if isinstance(own, Mapping) else None
    if not isinstance(found, Mapping) or found.keys() - {name}:
        raise ConfigError(
            f"config.json: per_layer_config is {reprlib.repr(own)}; it must be an object that says by the number of a "
            f"layer its {name}, and nothing else: correct it"
        )
    return Fields(found, f"per_layer_config.{layer}.").size(name, default=usual)


def _halves(config: Mapping[str, Any], fields: Fields, count: int) -> list[FeedForward]:
    """Of every layer. Dense ones have the bounds that are those of the shared expert elsewhere."""
    experts, dense = _experts(fields), FeedForward(fields.size("intermediate_size"), names=NAMES)
    sparse = _numbers(config.get("moe_layers_enum"), count)
    default = [SPARSE if layer in sparse else DENSE for layer in range(count)]
    kinds = fields.choices("mlp_layer_types", default=default, allowed=(DENSE, SPARSE))
    limits = fields.limits("swiglu_limits", count), fields.limits("swiglu_limits_shared", count)
    return [
        replace(experts, bound=bound, shared_bound=shared) if kind == SPARSE else replace(dense, bound=shared)
        for kind, bound, shared in zip(kinds, *limits, strict=True)
    ]


def _numbers(given: Any, count: int) -> set[int]:
    """The layers that have experts, in a list or with commas between them; all but the first few if none are named."""
    if given is None:
        return set(range(FIRST_SPARSE, count))
    items = [item.strip() for item in given.split(",")] if isinstance(given, str) else given
    if not isinstance(items, list) or not all(_NUMBER.fullmatch(str(item)) for item in items):
        raise ConfigError(
            f"config.json: moe_layers_enum is {reprlib.repr(given)}; it must be numbers of layers, in a list or with "
            "commas between them: correct it"
        )
    return {int(item) for item in items if str(item)}


def _experts(fields: Fields) -> FeedForward:
    intermediate = fields.size("moe_intermediate_size", default=1280)
    experts = read_experts(fields, intermediate, renormalise=True, names=NAMES)
    assert experts.router is not None
    scale = fields.number("moe_router_scaling_factor", default=1.0)
    router = Router(experts.router.top_k, "sigmoid", scale=scale, correction=True)
    return replace(experts, router=router, shared_intermediate=fields.size("share_expert_dim", default=1280))
