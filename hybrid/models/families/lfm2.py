"""LFM2: gated short convolutions in most layers, grouped-query attention in the others; dense feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import FULL, Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.base import Mixer
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryNames
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.layers.short_conv import ShortConv
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec, OuterNames
from hybrid.models.tensors import GatedNames

CONV = "conv"  # word of `layer_types`
DEFAULTS = Defaults(max_position=128_000, eps=1e-5, theta=1e6, kv_heads=8, tied=True)
_LAYER = "model.layers.{layer}"
ATTENTION = GroupedQueryNames(
    norm=f"{_LAYER}.operator_norm.weight",
    out=f"{_LAYER}.self_attn.out_proj.weight",
    q_norm=f"{_LAYER}.self_attn.q_layernorm.weight",
    k_norm=f"{_LAYER}.self_attn.k_layernorm.weight",
)
FEED_FORWARD = FeedForwardNames(
    norm=f"{_LAYER}.ffn_norm.weight",
    dense=GatedNames(
        gate=f"{_LAYER}.feed_forward.w1.weight",
        up=f"{_LAYER}.feed_forward.w3.weight",
        down=f"{_LAYER}.feed_forward.w2.weight",
    ),
)
OUTER = OuterNames(final_norm="model.embedding_norm.weight")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    feed_forward = FeedForward(_read_intermediate(fields), names=FEED_FORWARD)
    layers = [LayerSpec(mixer, feed_forward) for mixer in read_mixers(fields)]
    return read_model(fields, "lfm2", layers, DEFAULTS, OUTER)


def read_mixers(fields: Fields) -> list[Mixer]:
    """Of every layer a convolution or attention."""
    attention = replace(read_attention(fields, DEFAULTS, qk_norm="head"), names=ATTENTION)
    taps = fields.size("conv_L_cache", default=3, minimum=2, maximum=8)  # of what the kernel holds in registers
    conv = ShortConv(fields.size("hidden_size"), taps, fields.flag("conv_bias"))
    return [conv if kind == CONV else attention for kind in _read_kinds(fields)]


def _read_kinds(fields: Fields) -> Sequence[str]:
    """Of every layer: by name, or by the numbers of those that attend; without a word all do."""
    count = read_layer_count(fields)
    attending = fields.integers("full_attn_idxs") if fields.has("full_attn_idxs") else range(count)
    default = [FULL if layer in attending else CONV for layer in range(count)]
    return fields.choices("layer_types", default=default, allowed=(FULL, CONV))


def _read_intermediate(fields: Fields) -> int:
    """Two thirds of what config.json says, by a factor, rounded up: as the reference code adjusts it."""
    size = fields.size("block_ff_dim", "intermediate_size")
    if not fields.flag("block_auto_adjust_ff_dim", default=True):
        return size
    factor = fields.number("block_ffn_dim_multiplier", default=1.0)
    multiple = fields.size("block_multiple_of", default=256)
    return -(-int(factor * int(2 * size / 3)) // multiple) * multiple
