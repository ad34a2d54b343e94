"""dots.llm1: norms on heads, the experts of DeepSeek-V3, first layers dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    FULL,
    SHARED_EXPERTS,
    SLIDING,
    Defaults,
    read_attention,
    read_experts,
    read_first_dense,
    read_grouped_sigmoid,
    read_model,
    read_windows,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=2048, kv_heads=32)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
    halves = read_first_dense(fields, _experts(fields), default=0)
    window = fields.optional_size("sliding_window", default=4096)
    first = fields.size("max_window_layers", default=62, minimum=0)
    default = [SLIDING if window and layer >= first else FULL for layer in range(len(halves))]
    layers = [
        LayerSpec(replace(attention, window=window), half)
        for window, half in zip(read_windows(fields, window, default=default), halves, strict=True)
    ]
    return read_model(fields, "dots1", layers, DEFAULTS)


def _experts(fields: Fields) -> FeedForward:
    intermediate = fields.size("moe_intermediate_size")
    experts = read_experts(fields, intermediate, renormalise=fields.flag("norm_topk_prob"), names=SHARED_EXPERTS)
    experts = read_grouped_sigmoid(fields, experts, scale=1.0)
    return replace(experts, shared_intermediate=intermediate * fields.size("n_shared_experts"))
