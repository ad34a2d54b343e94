"""K-EXAONE: the attention of EXAONE 4 behind usual norms, the experts of DeepSeek-V3, first layers dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import SHARED_EXPERTS, read_attention, read_experts, read_grouped_sigmoid, read_model
from hybrid.models.deepseek import read_named_layers
from hybrid.models.families.exaone4 import DEFAULTS, read_turned_windows
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

NAMES = replace(SHARED_EXPERTS, correction="model.layers.{layer}.mlp.e_score_correction_bias")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    mixers = read_turned_windows(fields, read_attention(fields, DEFAULTS, qk_norm="head"))
    halves = read_named_layers(fields, _experts(fields))
    layers = [LayerSpec(*pair) for pair in zip(mixers, halves, strict=True)]
    return read_model(fields, "exaone_moe", layers, DEFAULTS)


def _experts(fields: Fields) -> FeedForward:
    intermediate, renormalise = fields.size("moe_intermediate_size"), fields.flag("norm_topk_prob", default=True)
    experts = read_experts(fields, intermediate, renormalise=renormalise, names=NAMES)
    shared = intermediate * fields.size("num_shared_experts", default=1)
    return replace(read_grouped_sigmoid(fields, experts, scale=2.5), shared_intermediate=shared)
