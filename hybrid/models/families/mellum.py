"""Mellum 2: Qwen3-MoE in which layers may have a window, and each kind of layer a rope of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, kv_heads=4, head_dim=128)
WINDOW = 1024  # where config.json says nothing
THETAS = {FULL: 500_000.0, SLIDING: 10_000.0}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.number("rope_theta", default=THETAS[FULL], above=1)  # whether or not another takes its place
    window = fields.optional_size("sliding_window", default=WINDOW)
    windows = read_windows(fields, window, default=[FULL] * read_layer_count(fields))
    everything, sliding = _attention(config, FULL), replace(_attention(config, SLIDING), window=window)
    experts = read_experts(
        fields, fields.size("moe_intermediate_size"), renormalise=fields.flag("norm_topk_prob", default=True)
    )
    halves = read_named_layers(fields, experts, dense=0)
    layers = [LayerSpec(sliding if one else everything, half) for one, half in zip(windows, halves, strict=True)]
    return read_model(fields, "mellum", layers, DEFAULTS)


def _attention(config: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    fields = Fields(of_rope(config, kind, {"rope_theta": THETAS[kind]}))
    return read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
