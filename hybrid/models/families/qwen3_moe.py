"""Qwen3-MoE: RMSNorm on every query and key head before rope, routed experts on most or all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_experts, read_model, read_sparse_layers
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=32_768, kv_heads=4)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    window = fields.optional_size("sliding_window", default=4096) if fields.flag("use_sliding_window") else None
    bias = fields.flag("attention_bias")
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=bias, window=window)
    experts = read_experts(fields, fields.size("moe_intermediate_size"), renormalise=fields.flag("norm_topk_prob"))
    layers = [LayerSpec(attention, feed_forward) for feed_forward in read_sparse_layers(fields, experts)]
    return read_model(fields, "qwen3_moe", layers, DEFAULTS)
