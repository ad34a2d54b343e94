"""Gemma 2: norms around each half of a layer, bounds of scores and of logits, every other layer with a window, gelu."""

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
from hybrid.models.gemma import ATTENTION, FEED_FORWARD
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=8192, kv_heads=4, head_dim=256, tied=True)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.refuse("use_bidirectional_attention", neutral=False)
    attention = replace(
        read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias")),
        scale=fields.number("query_pre_attn_scalar", default=256.0) ** -0.5,
        score_cap=_read_cap(fields, "attn_logit_softcapping", 50.0) or 0.0,
        names=ATTENTION,
    )
    feed_forward = FeedForward(fields.size("intermediate_size"), activation="gelu_tanh", names=FEED_FORWARD)
    window = fields.optional_size("sliding_window", default=4096)
    in_turn = [FULL if layer % 2 else SLIDING for layer in range(read_layer_count(fields))]
    windows = read_windows(fields, window, default=in_turn)
    layers = [LayerSpec(replace(attention, window=one), feed_forward) for one in windows]
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    model = read_model(fields, "gemma2", layers, DEFAULTS, activation=activation)
    cap = _read_cap(fields, "final_logit_softcapping", 30.0)
    return replace(model, norm="rms_less_one", embedding_scale=sqrt(model.hidden), logit_cap=cap)


def _read_cap(fields: Fields, name: str, default: float) -> float | None:
    """Null means no bounds."""
    return None if fields.is_null(name) else fields.number(name, default=default)
