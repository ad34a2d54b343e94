"""gpt-oss: biases and sinks in attention, windows on every other layer, clamped SwiGLU in experts with biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    FULL,
    SLIDING,
    Defaults,
    read_attention,
    read_experts,
    read_layer_count,
    read_model,
    read_windows,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.router import FeedForwardNames, Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import GatedNames

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, theta=150_000.0, kv_heads=8, head_dim=64)
ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
ROUTER = "model.layers.{layer}.mlp.router.weight"
EXPERTS = "model.layers.{layer}.mlp.experts"
NAMES = FeedForwardNames(
    router=ROUTER,
    fused_router=ROUTER,
    experts=GatedNames(
        "", "", "", f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj", fused_alternate=True, fused_transposed=True
    ),
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(_with_rope(config))
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias", default=True))
    attention = replace(attention, sinks=True)
    experts, count = _read_experts(fields), read_layer_count(fields)
    windows = read_windows(
        fields,
        fields.optional_size("sliding_window", default=128),
        default=[FULL if layer % 2 else SLIDING for layer in range(count)],
    )
    layers = [LayerSpec(replace(attention, window=window), experts) for window in windows]
    return read_model(fields, "gpt_oss", layers, DEFAULTS)


def _with_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without a word about rope the family means yarn, where others mean none."""
    told = any(config.get(name) is not None for name in ("rope_scaling", "rope_parameters"))
    return config if told else {**config, "rope_scaling": ROPE}


def _read_experts(fields: Fields) -> FeedForward:
    """The kernel has the two constants of the published models built in, so others are refused."""
    fields.refuse("swiglu_alpha", neutral=1.702)
    fields.refuse("swiglu_limit", neutral=7.0)
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=True, names=NAMES)
    assert experts.router is not None
    router = Router(experts.router.top_k, "topk_softmax", bias=True)
    return replace(experts, router=router, activation="swiglu_clamped", bias=True)
