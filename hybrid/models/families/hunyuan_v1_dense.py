"""Hunyuan, dense: norms of queries and keys behind rope, whose base may be stretched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import read_attention, read_layer_count, read_model
from hybrid.models.families.hunyuan_v1_moe import ATTENTION, DEFAULTS, with_alpha
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(with_alpha(config))
    attention = read_attention(fields, DEFAULTS, qk_norm="head", bias=fields.flag("attention_bias"))
    attention = replace(attention, norm_last=True, names=ATTENTION)
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size")))
    return read_model(fields, "hunyuan_v1_dense", [layer] * read_layer_count(fields), DEFAULTS)
