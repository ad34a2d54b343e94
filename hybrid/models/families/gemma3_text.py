"""Gemma 3, the text models: norms around each half of a layer, ropes of two bases, a scaled embedding, gelu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

from hybrid.models.decoder import (
    FULL,
    SLIDING,
    Defaults,
    read_attention,
    read_layer_count,
    read_model,
    read_windows,
)
from hybrid.models.gemma import ATTENTION, FEED_FORWARD, read_logit_cap
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, theta=1e6, kv_heads=4, head_dim=256, tied=True)
LOCAL_THETA = 10_000.0


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.refuse("attn_logit_softcapping")
    for name in ("rope_theta", "rope_local_base_freq"):  # a base, whether or not another takes its place
        fields.number(name, default=LOCAL_THETA, above=1)
    fields.refuse("use_bidirectional_attention", neutral=False)
    feed_forward = FeedForward(fields.size("intermediate_size"), activation="gelu_tanh", names=FEED_FORWARD)
    window = fields.optional_size("sliding_window", default=4096)
    attention = {None: _attention(config, FULL), window: replace(_attention(config, SLIDING), window=window)}
    layers = [LayerSpec(attention[one], feed_forward) for one in _windows(fields, window)]
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    model = read_model(fields, "gemma3_text", layers, DEFAULTS, activation=activation)
    cap = read_logit_cap(fields)
    return replace(model, norm="rms_less_one", embedding_scale=sqrt(model.hidden), logit_cap=cap)


def _windows(fields: Fields, window: int | None) -> list[int | None]:
    """Without a list of layers every `sliding_window_pattern`-th one sees everything."""
    pattern = fields.size("sliding_window_pattern", default=6)
    default = [SLIDING if (layer + 1) % pattern else FULL for layer in range(read_layer_count(fields))]
    return read_windows(fields, window, default=default)


def _attention(config: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    fields = Fields(_with_rope(config, kind))
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
    scale = fields.number("query_pre_attn_scalar", default=256.0) ** -0.5
    return replace(attention, scale=scale, names=ATTENTION)


def _with_rope(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The configuration with the rope of one kind of layer alone. Those of transformers 4 stretch only that of layers
    that see everything, and name the other base apart.
    """
    rest = {name: value for name, value in config.items() if not name.startswith("rope_")}
    both = config.get("rope_parameters")
    if isinstance(both, Mapping):
        own = both.get(kind) or {}
    elif kind == FULL:
        own = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    else:
        own = {"rope_theta": config.get("rope_local_base_freq")}
    theta = DEFAULTS.theta if kind == FULL else LOCAL_THETA
    return {**rest, "rope_theta": theta, "rope_parameters": own}
