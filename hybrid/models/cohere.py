"""What Cohere's models share: a feed-forward beside attention, LayerNorms without a bias, a scale of logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hybrid.models.decoder import Defaults, read_model
from hybrid.models.layers.beside_attention import BesideAttention, EarlyAttention
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import gated_names

DEFAULTS = Defaults(max_position=8192, eps=1e-5, tied=True, rope_interleaved=True)
NAMES = FeedForwardNames(
    norm="model.layers.{layer}.input_layernorm.weight",
    shared=gated_names("model.layers.{layer}.mlp.shared_experts"),
)


def read_cohere(
    fields: Fields,
    model_type: str,
    halves: Iterable[tuple[GroupedQueryAttention, FeedForward]],
    defaults: Defaults = DEFAULTS,
) -> ModelSpec:
    """The whole decoder, of the halves of each layer."""
    layers = [_beside(attention, feed_forward) for attention, feed_forward in halves]
    model = read_model(fields, model_type, layers, defaults)
    return replace(
        model,
        norm="layer_unbiased",
        eps=fields.number("layer_norm_eps", default=defaults.eps),
        logit_scale=fields.number("logit_scale", default=0.0625),
    )


def _beside(attention: GroupedQueryAttention, feed_forward: FeedForward) -> LayerSpec:
    early = EarlyAttention.of(attention)
    return LayerSpec(early, BesideAttention.of(feed_forward, early))
