"""Qwen3-VL with experts: the text model, which is Qwen3-MoE without images, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.families import qwen3_moe
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.text_part import read_text_part


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "qwen3_vl_moe", {"qwen3_vl_moe_text": _text})


def _text(config: Mapping[str, Any]) -> ModelSpec:
    """Experts are published as the transposes of what Qwen3-MoE has; their weights are always renormalised."""
    spec = qwen3_moe.spec({**config, "norm_topk_prob": True})
    return replace(spec, layers=tuple(map(_transposed, spec.layers)))


def _transposed(layer: LayerSpec) -> LayerSpec:
    names = layer.feed_forward.names
    experts = replace(names.experts, fused_transposed=True)
    return replace(layer, feed_forward=replace(layer.feed_forward, names=replace(names, experts=experts)))
