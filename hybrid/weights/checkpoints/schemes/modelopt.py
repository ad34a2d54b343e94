"""modelopt: fp8, MXFP8 and NVFP4 as NVIDIA publishes them, all matrices alike or each its own way."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.scaled import ScaledScheme

_FORMATS = {
    "FP8": "fp8", "FP8_PB_WO": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_row", "MXFP8": "bf16", "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
}  # fmt: skip
_MIXED = "MIXED_PRECISION"
WORDS = f"modelopt {', '.join(_FORMATS)} and {_MIXED} of these"


def read_scheme(quantisation: Mapping[str, Any]) -> ScaledScheme:
    fields = Fields(quantisation, "quantization_config.")
    algorithm = fields.choice("quant_algo", default="", allowed=(*_FORMATS, _MIXED))
    if algorithm != _MIXED:
        return ScaledScheme(_FORMATS[algorithm])
    layers = quantisation.get("quantized_layers")
    if not isinstance(layers, Mapping) or not layers or not all(isinstance(own, Mapping) for own in layers.values()):
        raise ConfigError(
            f"config.json: quantization_config.quantized_layers is {reprlib.repr(layers)}; of {_MIXED} it must be an "
            "object that has a quant_algo for each module: take the complete config.json of the model"
        )
    found = (
        Fields(own, f"quantization_config.quantized_layers of {name:.100}.").choice(
            "quant_algo", default="", allowed=tuple(_FORMATS)
        )
        for name, own in layers.items()
    )
    return ScaledScheme(_FORMATS[Counter(found).most_common(1)[0][0]])
