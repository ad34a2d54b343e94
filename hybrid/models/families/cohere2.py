"""Command A and Command R7B: as Command R, three of four layers with a window, the others without rope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.cohere import DEFAULTS, NAMES, read_cohere
from hybrid.models.decoder import FULL, SLIDING, read_attention, read_layer_count, read_windows
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """`transformers` knows heads of one size alone, a part of the hidden size."""
    fields = Fields(config)
    fields.refuse("use_qk_norm", neutral=False)
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias"))
    fields.refuse("head_dim", neutral=fields.size("hidden_size") // attention.heads)
    every = fields.size("sliding_window_pattern", default=4)
    in_turn = [SLIDING if (layer + 1) % every else FULL for layer in range(read_layer_count(fields))]
    windows = read_windows(fields, fields.optional_size("sliding_window", default=4096), default=in_turn)
    feed_forward = FeedForward(fields.size("intermediate_size"), names=NAMES)
    mixers = [replace(attention, window=window, rope=attention.rope if window else None) for window in windows]
    return read_cohere(fields, "cohere2", [(mixer, feed_forward) for mixer in mixers])
