"""Mixtral: every layer routed, top-k weights renormalised; w1 is the gate, w3 up, w2 down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_experts, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForwardNames
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, theta=1e6, kv_heads=8)
MOE = "model.layers.{layer}.block_sparse_moe"
USUAL = FeedForwardNames()
NAMES = replace(
    USUAL,
    router=f"{MOE}.gate.weight",
    experts=replace(
        USUAL.experts,
        gate=f"{MOE}.experts.{{expert}}.w1.weight",
        up=f"{MOE}.experts.{{expert}}.w3.weight",
        down=f"{MOE}.experts.{{expert}}.w2.weight",
    ),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, window=fields.optional_size("sliding_window"))
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=True, names=NAMES)
    layer = LayerSpec(attention, experts)
    return read_model(fields, "mixtral", [layer] * read_layer_count(fields), DEFAULTS)
