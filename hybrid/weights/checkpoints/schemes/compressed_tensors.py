"""compressed-tensors: int4 packed in words, as Kimi-K2-Thinking's experts are, and numbers of 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.base import Scheme
from hybrid.weights.checkpoints.schemes.codes import CodesScheme, read_group
from hybrid.weights.checkpoints.schemes.scaled import ScaledScheme

_PACKED = "pack-quantized"
_SCALED = {
    "float-quantized": ScaledScheme("fp8"),
    "int-quantized": ScaledScheme("int8"),
    "naive-quantized": ScaledScheme("bf16"),
    "mxfp8-quantized": ScaledScheme("bf16"),
    "mxfp4-pack-quantized": ScaledScheme("mxfp4", packed=True),
    "nvfp4-pack-quantized": ScaledScheme("bf16", packed=True, divides=True),
}
WORDS = f"compressed-tensors int4 ({_PACKED}, symmetric) and {', '.join(_SCALED)}"


def read_scheme(quantisation: Mapping[str, Any]) -> Scheme:
    fields = Fields(quantisation, "quantization_config.")
    format = fields.choice("format", default=_PACKED, allowed=(_PACKED, *_SCALED))
    if quantisation.get("transform_config"):
        fields.refuse("transform_config")
    groups = _weights(quantisation)
    weights = [Fields(each, "quantization_config.config_groups.weights.") for each in groups]
    for each in weights:
        each.refuse("symmetric", neutral=True)
        each.refuse("actorder")
    if format != _PACKED:
        strategy = weights[0].choice(
            "strategy", default="tensor", allowed=("tensor", "channel", "block", "group", "tensor_group")
        )
        rows = format == "float-quantized" and strategy not in ("tensor", "block")
        return ScaledScheme("bf16") if rows else _SCALED[format]
    if any(each != groups[0] for each in groups):
        raise _mixed()
    own = weights[0]
    own.size("num_bits", minimum=4, maximum=4)
    own.choice("type", default="int", allowed=("int",))
    own.choice("strategy", default="group", allowed=("group", "channel"))
    return CodesScheme("weight_packed", "weight_scale", None, ("weight_shape",), read_group(own), symmetric=True)


def _weights(quantisation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each group of modules says of its weights."""
    groups = quantisation.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") for group in found if isinstance(group, Mapping)]
    described = [each for each in weights if isinstance(each, Mapping)]
    if not weights or len(described) != len(weights):
        raise _mixed()
    return described


def _mixed() -> ConfigError:
    return ConfigError(
        "config.json: config_groups of quantization_config must quantise all weights in one way: take another "
        "checkpoint"
    )
