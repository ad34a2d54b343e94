"""Granite 4: layers of Mamba-2 and of attention, with rope or without; experts and a shared one, or dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_experts, read_layer_count, read_model
from hybrid.models.families import granitemoe
from hybrid.models.layers.base import Mixer
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.router import Router
from hybrid.models.mamba import ATTENDS, MAMBA, read_mamba
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import GatedNames

DEFAULTS = Defaults(max_position=2048)
_SHARED = "model.layers.{layer}.shared_mlp"
_GATED = GatedNames("", "", "", f"{_SHARED}.input_linear.weight", f"{_SHARED}.output_linear.weight")
NAMES = replace(granitemoe.NAMES, dense=_GATED, shared=_GATED)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Both halves of a layer are multiplied before they are added to the residual stream. This is kept divided by that
    number instead, which no norm of it sees but in its epsilon.
    """
    fields = Fields(with_words(config, {"layers_block_type": "layer_types"}))
    fields.choice("normalization_function", default="rmsnorm", allowed=("rmsnorm",))
    feed_forward = _read_feed_forward(fields)
    layers = [LayerSpec(mixer, feed_forward) for mixer in _read_mixers(fields)]
    model = read_model(fields, "granitemoehybrid", layers, DEFAULTS)
    added = fields.number("residual_multiplier", default=1.0)
    return replace(
        model,
        eps=model.eps / added**2,
        embedding_scale=fields.number("embedding_multiplier", default=1.0) / added,
        logit_scale=1 / fields.number("logits_scaling", default=1.0),
    )


def _read_mixers(fields: Fields) -> list[Mixer]:
    """Of every layer Mamba-2, or attention."""
    default = [MAMBA[-1]] * read_layer_count(fields)
    kinds = fields.choices("layer_types", default=default, allowed=(*MAMBA, *ATTENDS))
    attention = _read_attention(fields)
    if not any(kind in MAMBA for kind in kinds):
        return [attention for _ in kinds]
    mamba = read_mamba(fields, eps=fields.number("rms_norm_eps", default=DEFAULTS.eps))
    return [attention if kind in ATTENDS else mamba for kind in kinds]


def _read_attention(fields: Fields) -> GroupedQueryAttention:
    """It turns only where `position_embedding_type` says rope."""
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias"))
    turns = fields.choice("position_embedding_type", default="nope", allowed=("rope", "nope")) == "rope"
    scale = fields.number("attention_multiplier", default=1.0)
    return replace(attention, scale=scale, rope=attention.rope if turns else None)


def _read_feed_forward(fields: Fields) -> FeedForward:
    """What all rows share is there always; without experts it is all there is."""
    shared = fields.size("shared_intermediate_size", default=1024)
    if not fields.size("num_local_experts", default=8, minimum=0):
        return FeedForward(shared, names=NAMES)
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=True, names=NAMES)
    assert experts.router is not None
    return replace(experts, router=Router(experts.router.top_k, "topk_softmax"), shared_intermediate=shared)
