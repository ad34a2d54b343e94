"""compressed-tensors, `pack-quantized`: symmetric codes in rows, as Kimi-K2-Thinking's experts are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.codes import Scheme, read_group

WORDS = "compressed-tensors int4 (pack-quantized, symmetric)"


def read_scheme(quantisation: Mapping[str, Any]) -> Scheme:
    fields = Fields(quantisation, "quantization_config.")
    fields.choice("format", default="pack-quantized", allowed=("pack-quantized",))
    groups = quantisation.get("config_groups")
    weights = (
        [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    if not weights or any(each != weights[0] for each in weights) or not isinstance(weights[0], Mapping):
        raise ConfigError(
            "config.json: config_groups of quantization_config must quantise all weights in one way: take another "
            "checkpoint"
        )
    own = Fields(weights[0], "quantization_config.config_groups.weights.")
    own.size("num_bits", minimum=4, maximum=4)
    own.choice("type", default="int", allowed=("int",))
    own.choice("strategy", default="group", allowed=("group", "channel"))
    own.refuse("symmetric", neutral=True)
    own.refuse("actorder")
    return Scheme("weight_packed", "weight_scale", None, ("weight_shape",), read_group(own), symmetric=True)
