"""Granite 3: dense, four multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=2048)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """Both halves of a layer are multiplied before they are added to the residual stream. This is kept divided by that
    number instead, which no norm sees but in its epsilon.
    """
    fields = Fields(config)
    attention = replace(
        read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias")),
        scale=fields.number("attention_multiplier", default=1.0),
    )
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size"), bias=fields.flag("mlp_bias")))
    model = read_model(fields, "granite", [layer] * read_layer_count(fields), DEFAULTS)
    added = fields.number("residual_multiplier", default=1.0)
    return replace(
        model,
        eps=model.eps / added**2,
        embedding_scale=fields.number("embedding_multiplier", default=1.0) / added,
        logit_scale=1 / fields.number("logits_scaling", default=1.0),
    )
