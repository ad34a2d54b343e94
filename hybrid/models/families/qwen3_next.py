"""Qwen3-Next: Gated DeltaNet in three of four layers, gated attention in the fourth; experts and a gated shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import read_model, read_sparse_layers
from hybrid.models.layers.gated_delta import GatedDeltaNames
from hybrid.models.qwen_next import NEXT, read_mixers, read_shared_experts
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    experts = read_shared_experts(fields, renormalise=fields.flag("norm_topk_prob", default=True))
    mixers = read_mixers(fields, NEXT, GatedDeltaNames())
    halves = read_sparse_layers(fields, experts)
    layers = [LayerSpec(mixer, half) for mixer, half in zip(mixers, halves, strict=True)]
    return replace(read_model(fields, "qwen3_next", layers, NEXT), norm="rms_less_one")
