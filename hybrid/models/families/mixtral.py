"""Mixtral: every layer routed, top-k weights renormalised; w1 is the gate, w3 up, w2 down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import (
    MIXTRAL_NAMES,
    Defaults,
    read_attention,
    read_experts,
    read_layer_count,
    read_model,
)
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, theta=1e6, kv_heads=8)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, window=fields.optional_size("sliding_window"))
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=True, names=MIXTRAL_NAMES)
    layer = LayerSpec(attention, experts)
    return read_model(fields, "mixtral", [layer] * read_layer_count(fields), DEFAULTS)
