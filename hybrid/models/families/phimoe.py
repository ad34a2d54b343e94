"""Phi-3.5-MoE: LayerNorms with biases, sparsemixer, frequencies of rope by the length of a sequence.

The published model's own code and earlier versions of transformers choose the frequencies by the length. transformers
5.24 chooses only the factor of cosines and sines so, and takes the short frequencies always. Here a long sequence has
the long ones, which the model was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.models.decoder import (
    MIXTRAL_NAMES,
    Defaults,
    read_attention,
    read_experts,
    read_layer_count,
    read_model,
)
from hybrid.models.layers.router import Router
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

DEFAULTS = Defaults(max_position=131_072, eps=1e-5, theta=1e6, kv_heads=8)
NAMES = replace(MIXTRAL_NAMES, fused_router="model.layers.{layer}.mlp.router.weight")
TOP_K = 2  # sparsemixer chooses two experts, whatever else a configuration says


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    _check_rope(fields.group("rope_scaling", "rope_parameters"))
    window = fields.optional_size("sliding_window")
    attention = read_attention(fields, DEFAULTS, bias=fields.flag("attention_bias"), window=window)
    top_k = fields.size("num_experts_per_tok", default=TOP_K, minimum=TOP_K, maximum=TOP_K, maximum_of="sparsemixer")
    experts = read_experts(fields, fields.size("intermediate_size"), renormalise=False, names=NAMES)
    router = Router(top_k, "sparsemixer", renormalise=False, jitter=_jitter(fields))
    layer = LayerSpec(attention, replace(experts, router=router))
    model = read_model(fields, "phimoe", [layer] * read_layer_count(fields), DEFAULTS)
    return replace(model, norm="layer", head_bias=fields.flag("lm_head_bias"))


def _jitter(fields: Fields) -> float:
    """0 is allowed: then only equal scores share."""
    if fields.is_zero("router_jitter_noise"):
        return 0.0
    return fields.number("router_jitter_noise", default=0.01)


def _check_rope(scaling: Fields) -> None:
    """Beside longrope, whose two magnitudes the family wants to be told, there is only rope as it is."""
    if scaling.choice("rope_type", "type", default="default", allowed=("default", "longrope")) == "longrope":
        for name in ("short_mscale", "long_mscale"):
            scaling.number(name)
