"""Sarvam 30B: GLM-4.5 whose heads turn whole, with projections in one matrix and names of its own.

Layers for the prediction of further tokens, which a checkpoint has behind its last one, are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    SHARED_EXPERTS,
    Defaults,
    read_attention,
    read_experts,
    read_first_dense,
    read_grouped_sigmoid,
    read_model,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention, GroupedQueryNames
from hybrid.models.layers.grouped_query_shape import QkNorm
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import LayerSpec, ModelSpec, OuterNames

DEFAULTS = Defaults(max_position=131_072, theta=8e6, kv_heads=4, head_dim=64, rope_part=1.0)
WORDS = {
    "num_shared_experts": "n_shared_experts",
    "score_function": "scoring_func",
    "use_qkv_bias": "attention_bias",
}
_ATTENTION = "model.layers.{layer}.attention"
NAMES = GroupedQueryNames(
    qkv=f"{_ATTENTION}.query_key_value.weight",
    out=f"{_ATTENTION}.dense.weight",
    q_norm=f"{_ATTENTION}.query_layernorm.weight",
    k_norm=f"{_ATTENTION}.key_layernorm.weight",
)
EXPERTS = replace(SHARED_EXPERTS, correction="model.layers.{layer}.mlp.gate.expert_bias")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(with_words(config, WORDS))
    fields.refuse("use_bias", neutral=False)
    halves = read_first_dense(fields, _read_experts(fields))
    layers = [LayerSpec(_read_attention(fields), half) for half in halves]
    outer = OuterNames(embedding="model.word_embeddings.weight")
    return read_model(fields, "sarvam_moe", layers, DEFAULTS, outer)


def _read_attention(fields: Fields) -> GroupedQueryAttention:
    norm: QkNorm = "head" if fields.flag("use_qk_norm", default=True) else "none"
    attention = read_attention(fields, DEFAULTS, qk_norm=norm, bias=fields.flag("attention_bias"))
    return replace(attention, out_bias=False, names=NAMES)


def _read_experts(fields: Fields) -> FeedForward:
    fields.choice("scoring_func", default="sigmoid", allowed=("sigmoid",))
    intermediate, renormalise = fields.size("moe_intermediate_size"), fields.flag("norm_topk_prob", default=True)
    experts = read_experts(fields, intermediate, renormalise=renormalise, names=EXPERTS)
    shared = intermediate * fields.size("n_shared_experts", default=1, minimum=0)
    return replace(read_grouped_sigmoid(fields, experts, scale=2.5), shared_intermediate=shared)
