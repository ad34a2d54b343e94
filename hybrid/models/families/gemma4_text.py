"""Gemma 4, the text models: heads of two sizes, keys that are values, experts beside a dense feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import FULL, SLIDING, Defaults, of_rope, read_attention, read_layer_count, read_model
from hybrid.models.gemma import ATTENTION, FEED_FORWARD, read_logit_cap
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.parallel_feed_forward import DENSE_STORED, ParallelFeedForward
from hybrid.models.layers.router import Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import GatedNames

DEFAULTS = Defaults(max_position=131_072, kv_heads=4, head_dim=256, tied=True)
GLOBAL_HEAD_DIM, PATTERN = 512, 6  # of layers that see everything: every 6th, where nothing else is said
ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
_LAYER = "model.layers.{layer}"
_EXPERT = f"{_LAYER}.experts.{{expert}}"
DENSE = replace(FEED_FORWARD, factor=f"{_LAYER}.layer_scalar")  # a whole feed-forward
BESIDE = replace(FEED_FORWARD, post_norm=f"{_LAYER}.post_feedforward_layernorm_1.weight")
EXPERTS = replace(
    DENSE,
    norm=f"{_LAYER}.pre_feedforward_layernorm_2.weight",
    router=f"{_LAYER}.router.proj.weight",
    fused_router=f"{_LAYER}.router.proj.weight",
    router_norm=f"{_LAYER}.router.scale",
    expert_scales=f"{_LAYER}.router.per_expert_scale",
    experts=GatedNames(
        f"{_EXPERT}.gate_proj.weight",
        f"{_EXPERT}.up_proj.weight",
        f"{_EXPERT}.down_proj.weight",
        f"{_LAYER}.experts.gate_up_proj",
        f"{_LAYER}.experts.down_proj",
    ),
    post_norm=f"{_LAYER}.post_feedforward_layernorm_2.weight",
    sum_norm=f"{_LAYER}.post_feedforward_layernorm.weight",
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    _refuse(fields)
    kinds, feed_forward = _kinds(fields), _feed_forward(fields)
    window = fields.size("sliding_window", default=512)
    attention = {SLIDING: replace(_attention(config, SLIDING), window=window), FULL: _attention(config, FULL)}
    layers = [LayerSpec(attention[kind], feed_forward) for kind in kinds]
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    model = read_model(fields, "gemma4_text", layers, DEFAULTS, activation=activation)
    return replace(model, embedding_scale=sqrt(model.hidden), logit_cap=read_logit_cap(fields))


def _refuse(fields: Fields) -> None:
    """What the small models have: E2B and E4B."""
    for name, default, meaning in (
        ("hidden_size_per_layer_input", 256, "embeddings of its own for every layer"),
        ("num_kv_shared_layers", 0, "layers that attend to the keys and values of others"),
    ):
        if not fields.is_zero(name) and (size := fields.optional_size(name, default=default)):
            raise ConfigError(
                f"config.json: {name} is {size}, which means {meaning}, as E2B and E4B have them; it must be 0: these "
                "are not computed here, take gemma-4-26B-A4B or gemma-4-31B"
            )
    fields.refuse("use_bidirectional_attention", neutral="vision")
    fields.refuse("attn_logit_softcapping")
    fields.number("rope_theta", default=1e4, above=1)  # a base, whether or not others take its place


def _kinds(fields: Fields) -> list[str]:
    """The last layer sees everything, whatever is said."""
    default = [SLIDING if (layer + 1) % PATTERN else FULL for layer in range(read_layer_count(fields))]
    return [*fields.choices("layer_types", default=default, allowed=(FULL, SLIDING))[:-1], FULL]


def _attention(config: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    own = of_rope(config, kind, ROPES[kind])
    shared = kind == FULL and Fields(config).flag("attention_k_eq_v")
    if kind == FULL:
        own = {**own, **_global_heads(config, shared)}
    fields = Fields(own)
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
    return replace(attention, scale=1.0, value_norm=True, keys_are_values=shared, names=ATTENTION)


def _global_heads(config: Mapping[str, Any], shared: bool) -> dict[str, Any]:
    """Sizes of the heads of layers that see everything: by name as published, or as transformers writes them, by layer
    under `per_layer_config`, where all must be the same.
    """
    fields = Fields(config)
    found: dict[str, Any] = {"head_dim": fields.size("global_head_dim", default=GLOBAL_HEAD_DIM)}
    if shared and fields.has("num_global_key_value_heads"):
        found["num_key_value_heads"] = fields.size("num_global_key_value_heads")
    by_layer = config.get("per_layer_config")
    if by_layer is None:
        return found
    kinds = _kinds(fields)
    wanted = {layer for layer, kind in enumerate(kinds) if kind == FULL}
    numbers = {int(key) for key in map(str, by_layer) if key.isdecimal()} if isinstance(by_layer, Mapping) else set()
    same = isinstance(by_layer, Mapping) and by_layer and len({repr(one) for one in by_layer.values()}) == 1
    own = next(iter(by_layer.values())) if same else None
    if (
        not isinstance(by_layer, Mapping)
        or len(by_layer) != len(numbers)
        or numbers != wanted
        or not isinstance(own, Mapping)
        or not {*own} <= {"head_dim", "num_key_value_heads"}
    ):
        raise ConfigError(
            "config.json: per_layer_config must give the same head_dim and num_key_value_heads to every layer of "
            "full_attention, and nothing to others: take the config.json of the published model"
        )
    return {**found, **own}


def _feed_forward(fields: Fields) -> FeedForward:
    plain = FeedForward(fields.size("intermediate_size"), activation="gelu_tanh", names=DENSE)
    if not fields.flag("enable_moe_block"):
        return plain
    experts = fields.size("num_experts", maximum=10**5)
    top_k = fields.size("top_k_experts", maximum=experts, maximum_of="num_experts")
    return ParallelFeedForward(
        fields.size("moe_intermediate_size"),
        experts,
        Router(top_k, expert_scales=True),
        activation="gelu_tanh",
        names=EXPERTS,
        dense=replace(plain, names=BESIDE, stored=DENSE_STORED),
    )
