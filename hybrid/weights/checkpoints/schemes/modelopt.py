"""modelopt: fp8, MXFP8 and NVFP4 as NVIDIA publishes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.scaled import ScaledScheme

_FORMATS = {"FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "bf16", "MXFP8": "bf16", "NVFP4": "bf16", "W4A16_NVFP4": "bf16"}
WORDS = f"modelopt {', '.join(_FORMATS)}"


def read_scheme(quantisation: Mapping[str, Any]) -> ScaledScheme:
    fields = Fields(quantisation, "quantization_config.")
    return ScaledScheme(_FORMATS[fields.choice("quant_algo", default="", allowed=tuple(_FORMATS))])
