"""Solar Open: the experts of GLM-4.5 in every layer, plain attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.families.glm4_moe import read_glm_experts
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, theta=1e6, kv_heads=8, head_dim=128)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = replace(read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias")), out_bias=False)
    layer = LayerSpec(attention, read_glm_experts(fields))
    return read_model(fields, "solar_open", [layer] * read_layer_count(fields), DEFAULTS)
