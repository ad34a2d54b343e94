"""Bamba: layers of Mamba-2, and some of attention whose heads turn by half."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.mamba import read_mamba
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec, OuterNames
from hybrid.models.tensors import gated_names

DEFAULTS = Defaults(max_position=262_144, eps=1e-5, kv_heads=8, rope_part=0.5)
OUTER = OuterNames(final_norm="model.final_layernorm.weight")
NAMES = FeedForwardNames(
    norm="model.layers.{layer}.pre_ff_layernorm.weight", dense=gated_names("model.layers.{layer}.feed_forward")
)
ATTENDING = "attn_layer_indices"


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias"))
    mamba = read_mamba(fields, eps=fields.number("rms_norm_eps", default=DEFAULTS.eps))
    feed_forward = FeedForward(fields.size("intermediate_size"), bias=fields.flag("mlp_bias"), names=NAMES)
    attends = _read_attending(fields)
    layers = [
        LayerSpec(attention if layer in attends else mamba, feed_forward) for layer in range(read_layer_count(fields))
    ]
    return read_model(fields, "bamba", layers, DEFAULTS, OUTER)


def _read_attending(fields: Fields) -> set[int]:
    """The numbers of the layers that attend."""
    attends, count = fields.integers(ATTENDING), read_layer_count(fields)
    if any(not 0 <= layer < count for layer in attends):
        raise ConfigError(
            f"config.json: {ATTENDING} is {attends}; it must be a list of numbers of layers, from 0 to {count - 1}: "
            "correct it"
        )
    return set(attends)
