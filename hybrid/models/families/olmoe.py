"""OLMoE: one norm over all heads of the queries, one over those of the keys; weights of experts need not sum to 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_experts, read_layer_count, read_model
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=4096, eps=1e-5)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.refuse("clip_qkv")
    attention = read_attention(fields, DEFAULTS, qk_norm="whole", bias=fields.flag("attention_bias"))
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=fields.flag("norm_topk_prob"))
    layer = LayerSpec(attention, experts)
    return read_model(fields, "olmoe", [layer] * read_layer_count(fields), DEFAULTS)
