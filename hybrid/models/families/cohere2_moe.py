"""Command A+: as Command A, with experts, shared ones among them, behind dense layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.cohere import DEFAULTS, NAMES, read_cohere
from hybrid.models.decoder import FULL, SLIDING, read_attention, read_experts, read_layer_count, read_windows
from hybrid.models.deepseek import DENSE, SPARSE
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.router import Router
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec

AVERAGE, SUM = "average", "sum"  # words of how routed and shared experts are joined


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Layers without a window have no rope, but for dense ones where none of these has a window by default."""
    fields, defaults = Fields(config), replace(DEFAULTS, head_dim=128)
    dense = _read_dense(fields)
    attention = read_attention(fields, defaults, bias=fields.flag("attention_bias"))
    turns = fields.size("prefix_dense_sliding_window_pattern", default=1) == 1
    experts, plain = _read_experts(fields), _read_plain(fields)
    halves = [
        (
            replace(attention, window=window, rope=attention.rope if window or (is_dense and turns) else None),
            plain if is_dense else experts,
        )
        for window, is_dense in zip(_read_windows(fields), dense, strict=True)
    ]
    model = read_cohere(fields, "cohere2_moe", halves, defaults)
    return replace(model, norm="rms", eps=fields.number("rms_norm_eps")) if fields.has("rms_norm_eps") else model


def _first_dense(fields: Fields) -> int:
    return fields.size("first_k_dense_replace", default=0, minimum=0)


def _read_dense(fields: Fields) -> list[bool]:
    """Which layers are dense: by name, or the first few."""
    default = [DENSE if layer < _first_dense(fields) else SPARSE for layer in range(read_layer_count(fields))]
    return [kind == DENSE for kind in fields.choices("mlp_layer_types", default=default, allowed=(DENSE, SPARSE))]


def _read_windows(fields: Fields) -> list[int | None]:
    """By name, or in turn: among the first dense layers and among the others."""
    first, count = min(_first_dense(fields), read_layer_count(fields)), read_layer_count(fields)
    among_dense = fields.size("prefix_dense_sliding_window_pattern", default=1)
    among_others = fields.size("sliding_window_pattern", default=4)
    slides = [(layer + 1) % among_dense > 0 for layer in range(first)]
    slides += [(layer + 1) % among_others > 0 for layer in range(count - first)]
    default = [SLIDING if one else FULL for one in slides]
    return read_windows(fields, fields.optional_size("sliding_window", default=4096), default=default)


def _read_plain(fields: Fields) -> FeedForward:
    return FeedForward(fields.size("prefix_dense_intermediate_size", "intermediate_size"), names=NAMES)


def _read_experts(fields: Fields) -> FeedForward:
    """The sum of routed and shared experts may be halved: both are."""
    intermediate = fields.size("intermediate_size")
    experts = read_experts(fields, intermediate, renormalise=True, names=NAMES)
    shared = fields.size("num_shared_experts", default=0, minimum=0)
    joined = fields.choice("shared_expert_combination_strategy", default=AVERAGE, allowed=(AVERAGE, SUM))
    scale = 0.5 if shared and joined == AVERAGE else 1.0
    return replace(
        experts,
        router=replace(_read_router(fields, experts), scale=scale),
        shared_intermediate=intermediate * shared,
        shared_weight=scale,
    )


def _read_router(fields: Fields, experts: FeedForward) -> Router:
    assert experts.router is not None
    if fields.choice("expert_selection_fn", default="softmax", allowed=("softmax", "sigmoid")) == "softmax":
        return Router(experts.router.top_k, "topk_softmax")
    return Router(experts.router.top_k, "sigmoid", renormalise=fields.flag("norm_topk_prob", default=True))
