"""AWQ, its `gemm` layout: codes of a word lie along the outputs, in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.codes import CodesScheme, read_group

WORDS = "awq int4 (gemm)"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_scheme(quantisation: Mapping[str, Any]) -> CodesScheme:
    fields = Fields(quantisation, "quantization_config.")
    fields.size("bits", "w_bit", minimum=4, maximum=4)
    fields.choice("version", default="gemm", allowed=("gemm", "GEMM"))
    fields.refuse("zero_point", neutral=True)
    return CodesScheme(
        "qweight", "scales", "qzeros", (), read_group(fields), symmetric=False, transposed=True, order=ORDER
    )
