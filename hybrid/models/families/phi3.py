"""Phi-3 and Phi-4: queries, keys and values in one matrix, gate and up in one, frequencies of rope by length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import Defaults, read_attention, read_layer_count, read_model
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryNames
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.models.tensors import GatedNames

DEFAULTS = Defaults(max_position=4096, eps=1e-5, rope_part=1.0)
ORIGINAL_CONTEXT = 4096  # where nothing else is said
_LAYER = "model.layers.{layer}"
ATTENTION = GroupedQueryNames(qkv=f"{_LAYER}.self_attn.qkv_proj.weight")
FEED_FORWARD = FeedForwardNames(
    dense=GatedNames("", "", "", f"{_LAYER}.mlp.gate_up_proj.weight", f"{_LAYER}.mlp.down_proj.weight")
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(_with_longrope(config))
    fields.group("rope_scaling", "rope_parameters").choice(
        "rope_type", "type", default="default", allowed=("default", "longrope")
    )
    window = fields.optional_size("sliding_window")
    attention = replace(read_attention(fields, DEFAULTS, window=window), names=ATTENTION)
    layer = LayerSpec(attention, FeedForward(fields.size("intermediate_size"), names=FEED_FORWARD))
    return read_model(fields, "phi3", [layer] * read_layer_count(fields), DEFAULTS)


def _with_longrope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Early configurations call longrope su or yarn, and leave out the original context."""
    for name in ("rope_scaling", "rope_parameters"):
        scaling = config.get(name)
        if not isinstance(scaling, Mapping):
            continue
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind in ("su", "yarn"):
            config = {**config, name: {**scaling, "rope_type": "longrope"}}
        if "original_max_position_embeddings" not in scaling:
            config = {"original_max_position_embeddings": ORIGINAL_CONTEXT, **config}
    return config
