"""Mixtral: every layer routed, top-k weights renormalised; w1 is the gate, w3 up, w2 down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_experts, read_layer_count, read_model
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec, TensorNames

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, theta=1e6, kv_heads=8)
NAMES = TensorNames(
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    expert_gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    expert_up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    expert_down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, window=fields.optional_size("sliding_window"))
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=True)
    layer = LayerSpec(attention, experts)
    return read_model(fields, "mixtral", [layer] * read_layer_count(fields), DEFAULTS, NAMES)
