"""GLM-4-0414: dense, norms around each half of a layer; half of each head turns, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryNames
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import GatedNames

DEFAULTS = Defaults(max_position=131_072, eps=1.5625e-7, kv_heads=2, head_dim=128, rope_part=0.5, rope_interleaved=True)
_LAYER = "model.layers.{layer}"
ATTENTION = GroupedQueryNames(post_norm=f"{_LAYER}.post_self_attn_layernorm.weight")
FEED_FORWARD = FeedForwardNames(
    post_norm=f"{_LAYER}.post_mlp_layernorm.weight",
    dense=GatedNames("", "", "", f"{_LAYER}.mlp.gate_up_proj.weight", f"{_LAYER}.mlp.down_proj.weight"),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias", default=True))
    attention = replace(attention, out_bias=False, names=ATTENTION)
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size"), names=FEED_FORWARD))
    return read_model(fields, "glm4", [layer] * read_layer_count(fields), DEFAULTS)
