"""Hunyuan-A13B: norms of queries and keys behind rope, a shared expert beside the others, a stretched base of rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import Defaults, read_attention, read_experts, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryNames
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import gated_names

DEFAULTS = Defaults(max_position=2048, eps=1e-5)
_LAYER = "model.layers.{layer}"
ATTENTION = GroupedQueryNames(
    q_norm=f"{_LAYER}.self_attn.query_layernorm.weight", k_norm=f"{_LAYER}.self_attn.key_layernorm.weight"
)
NAMES = FeedForwardNames(
    router=f"{_LAYER}.mlp.gate.wg.weight",
    fused_router=f"{_LAYER}.mlp.gate.wg.weight",
    shared=gated_names(f"{_LAYER}.mlp.shared_mlp"),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(with_alpha(config))
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
    attention = replace(attention, norm_last=True, names=ATTENTION)
    layers = [LayerSpec(attention, _experts(fields, config, layer)) for layer in range(read_layer_count(fields))]
    return read_model(fields, "hunyuan_v1_moe", layers, DEFAULTS)


def _experts(fields: Fields, config: Mapping[str, Any], layer: int) -> FeedForward:
    """Some numbers may be lists, with one for each layer."""
    own = Fields({**config, **{name: _of_layer(config.get(name), layer, name) for name in ("moe_topk", "num_experts")}})
    intermediate = fields.size("intermediate_size")
    experts = read_experts(own, intermediate, renormalise=True, names=NAMES)
    return replace(experts, shared_intermediate=intermediate)


def _of_layer(value: Any, layer: int, name: str) -> Any:
    if not isinstance(value, list):
        return value
    if layer >= len(value):
        raise ConfigError(
            f"config.json: {name} has {len(value)} entries, and there is a layer {layer}: it must have one for each"
        )
    return value[layer]


def with_alpha(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """ "dynamic" rope with an alpha is plain rope whose base is stretched once, whatever the length."""
    fields = Fields(config)
    scaling = fields.group("rope_scaling", "rope_parameters")
    if not scaling.has("alpha"):
        return config
    scaling.choice("rope_type", "type", default="dynamic", allowed=("dynamic",))
    theta = scaling.number("rope_theta", default=fields.number("rope_theta", default=DEFAULTS.theta, above=1), above=1)
    dim = fields.size("head_dim", default=fields.size("hidden_size") // fields.size("num_attention_heads"), minimum=3)
    stretched = theta * scaling.number("alpha") ** (dim / (dim - 2))
    kept = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_parameters")}
    return {**kept, "rope_theta": stretched}
