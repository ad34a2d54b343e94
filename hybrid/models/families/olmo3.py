"""OLMo 3: OLMo 2 in which all but every fourth layer have a window; only the layers without one stretch their rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import FULL, SLIDING, Defaults, of_rope, read_layer_count, read_model, read_windows
from hybrid.models.families.olmo2 import read_feed_forward, read_normed_attention
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=2048, eps=1e-5, theta=500_000.0)
WINDOW, EVERY = 4096, 4  # where config.json says nothing


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    fields.number("rope_theta", default=DEFAULTS.theta, above=1)  # whether or not another takes its place
    window = fields.optional_size("sliding_window", default=WINDOW)
    default = [SLIDING if window and (layer + 1) % EVERY else FULL for layer in range(read_layer_count(fields))]
    everything, sliding = _attention(config, FULL), replace(_attention(config, SLIDING), window=window)
    feed_forward = read_feed_forward(fields)
    layers = [
        LayerSpec(sliding if one else everything, feed_forward) for one in read_windows(fields, window, default=default)
    ]
    return read_model(fields, "olmo3", layers, DEFAULTS)


def _attention(config: Mapping[str, Any], kind: str) -> GroupedQueryAttention:
    return read_normed_attention(Fields(_with_rope(config, kind)), DEFAULTS)


def _with_rope(config: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The configuration with the rope of one kind of layer alone: what is stretched without a word of kinds is that of
    layers that see everything.
    """
    if isinstance(config.get("rope_parameters"), Mapping):
        return of_rope(config, kind, {})
    return config if kind == FULL else {**config, "rope_scaling": None}
