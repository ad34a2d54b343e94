"""SmolLM3: dense, some layers without rope, which alone may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.decoder import FULL, SLIDING, Defaults, read_attention, read_layer_count, read_model, read_windows
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=32_768, theta=2e6, kv_heads=4, tied=True)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias"))
    feed_forward = FeedForward(fields.size("intermediate_size"), bias=fields.flag("mlp_bias"))
    turned = _read_turned(fields)
    window = fields.optional_size("sliding_window") if fields.flag("use_sliding_window") else None
    default = [SLIDING if window and not turns else FULL for turns in turned]
    layers = [
        LayerSpec(replace(attention, rope=attention.rope if turns else None, window=window), feed_forward)
        for turns, window in zip(turned, read_windows(fields, window, default=default), strict=True)
    ]
    return read_model(fields, "smollm3", layers, DEFAULTS)


def _read_turned(fields: Fields) -> list[int]:
    """For each layer 1 if it has rope, else 0: a list that may be longer, or all but every fourth or so."""
    count = read_layer_count(fields)
    if not fields.has("no_rope_layers"):
        step = fields.size("no_rope_layer_interval", default=4)
        return [int((layer + 1) % step != 0) for layer in range(count)]
    turned = fields.integers("no_rope_layers")
    if len(turned) < count or not {*turned} <= {0, 1}:
        raise ConfigError(
            f"config.json: no_rope_layers is {turned[:8]}{' ...' * (len(turned) > 8)}, {len(turned)} numbers; it must "
            f"have one for each of {count} layers, 1 with rope and 0 without: correct it"
        )
    return turned[:count]
