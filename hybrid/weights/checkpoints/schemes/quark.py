"""Quark: fp8, int8 and MXFP4 as AMD publishes them."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.scaled import ScaledScheme

_FORMATS = {"fp8_e4m3": "fp8", "fp4": "mxfp4", "int8": "int8"}
_SCHEMES = ("per_tensor", "per_channel", "per_group", "per_block")
WORDS = f"quark {', '.join(_FORMATS)}"


def read_scheme(quantisation: Mapping[str, Any]) -> ScaledScheme:
    export = quantisation.get("export")
    if isinstance(export, Mapping):
        Fields(export, "quantization_config.export.").choice(
            "weight_format", default="real_quantized", allowed=("real_quantized",)
        )
    if "rot" in str(quantisation.get("algo_config")).lower():  # which turn activations while a model runs
        Fields(quantisation, "quantization_config.").refuse("algo_config")
    found = [_weights(name, words) for name, words in _described(quantisation)]
    kinds = [each.choice("dtype", default="", allowed=tuple(_FORMATS)) for each in found]
    scheme = found[0].choice("qscheme", default="per_tensor", allowed=_SCHEMES)
    rows = kinds[0] == "fp8_e4m3" and scheme == "per_channel"
    symmetric = all(each.flag("symmetric", default=True) for each in found)
    return ScaledScheme("fp8_row" if rows else _FORMATS[kinds[0]], symmetric)


def _described(quantisation: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is said of all modules, then of some."""
    yield "global_quant_config", quantisation.get("global_quant_config")
    layers = quantisation.get("layer_quant_config")
    if isinstance(layers, Mapping):
        yield from ((f"layer_quant_config of {name:.100}", words) for name, words in layers.items() if words)


def _weights(name: str, words: Any) -> Fields:
    weight = words.get("weight") if isinstance(words, Mapping) else None
    if not isinstance(weight, Mapping):
        raise ConfigError(
            f"config.json: quantization_config.{name} is {reprlib.repr(words)}; it must have a weight with its dtype, "
            f"one of {', '.join(_FORMATS)}: take another checkpoint"
        )
    return Fields(weight, f"quantization_config.{name}.weight.")
