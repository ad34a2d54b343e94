"""Qwen3-MoE: RMSNorm on every query and key head before rope, routed experts on most or all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_experts, read_layer_count, read_model
from hybrid.models.reading import Fields
from hybrid.models.spec import FeedForwardSpec, LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=32_768, kv_heads=4)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    window = fields.optional_size("sliding_window", default=4096) if fields.flag("use_sliding_window") else None
    bias = fields.flag("attention_bias")
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=bias, window=window)
    layers = [LayerSpec(attention, feed_forward) for feed_forward in _feed_forwards(fields)]
    return read_model(fields, "qwen3_moe", layers, DEFAULTS)


def _feed_forwards(fields: Fields) -> list[FeedForwardSpec]:
    """Every `decoder_sparse_step`-th layer is routed, except those in `mlp_only_layers`."""
    layers = range(read_layer_count(fields))
    step, dense = fields.size("decoder_sparse_step", default=1), set(fields.integers("mlp_only_layers"))
    routed = [layer not in dense and (layer + 1) % step == 0 for layer in layers]
    experts = read_experts(fields, fields.size("moe_intermediate_size"), renormalise=fields.flag("norm_topk_prob"))
    if all(routed):
        return [experts for _ in layers]
    plain = FeedForwardSpec(fields.size("intermediate_size"))
    return [experts if is_routed else plain for is_routed in routed]
