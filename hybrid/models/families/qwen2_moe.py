"""Qwen2-MoE: biases on queries, keys and values, routed experts and one that a gate mixes into every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    FULL,
    SLIDING,
    Defaults,
    read_attention,
    read_experts,
    read_layer_count,
    read_model,
    read_sparse_layers,
    read_windows,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=32_768, kv_heads=16)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("qkv_bias", default=True))
    attention = replace(attention, out_bias=False)
    layers = [
        LayerSpec(replace(attention, window=window), feed_forward)
        for window, feed_forward in zip(_windows(fields), read_sparse_layers(fields, _experts(fields)), strict=True)
    ]
    return read_model(fields, "qwen2_moe", layers, DEFAULTS)


def _experts(fields: Fields) -> FeedForward:
    experts = read_experts(fields, fields.size("moe_intermediate_size"), renormalise=fields.flag("norm_topk_prob"))
    return replace(experts, shared_intermediate=fields.size("shared_expert_intermediate_size"), shared_gate=True)


def _windows(fields: Fields) -> list[int | None]:
    """Every other one of the first `max_window_layers` layers slides, if any does."""
    window = fields.optional_size("sliding_window", default=4096) if fields.flag("use_sliding_window") else None
    last = fields.size("max_window_layers", default=28, minimum=0) if window else 0
    layers = range(read_layer_count(fields))
    return read_windows(fields, window, default=[FULL if i % 2 or i >= last else SLIDING for i in layers])
