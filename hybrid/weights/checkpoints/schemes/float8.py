"""fp8 with one scale for each matrix or row: `weight_scale` beside e4m3 values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.scaled import ScaledScheme

WORDS = "fp8 with a scale for each matrix or row"


def read_scheme(quantisation: Mapping[str, Any]) -> ScaledScheme | None:
    """None for blocks, which have scales of another name."""
    if quantisation.get("weight_block_size") is not None:
        return None
    Fields(quantisation, "quantization_config.").refuse("fmt", neutral="e4m3")
    return ScaledScheme("fp8" if quantisation.get("quant_method") == "fp8" else "fp8_row")
