"""mxfp8: e4m3 with a power of two for each 32 inputs in `weight_scale_inv`, as MiniMax-M3 is published in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.scaled import ScaledScheme

WORDS = "mxfp8"


def read_scheme(quantisation: Mapping[str, Any]) -> ScaledScheme:
    fields = Fields(quantisation, "quantization_config.")
    fields.refuse("weight_block_size", neutral=[1, 32])
    fields.refuse("fmt", neutral="e4m3")
    fields.refuse("scale_fmt", neutral="ue8m0")
    fields.refuse("moe_quant_algo", neutral="MXFP8")
    return ScaledScheme("bf16")
