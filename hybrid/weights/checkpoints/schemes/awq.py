"""AWQ, its `gemm` layout: codes of a word lie along the outputs, in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.codes import Layout
from hybrid.weights.checkpoints.schemes.codes_scheme import CodesScheme, read_option

WORDS = "awq of 4 bits (gemm)"
LAYOUT = Layout(
    "qweight", "scales", "qzeros", transposed=True, along_rows=True, word=(0, 2, 4, 6, 1, 3, 5, 7), always_zeros=True
)  # fmt: skip


def read_scheme(quantisation: Mapping[str, Any]) -> CodesScheme:
    fields = Fields(quantisation, "quantization_config.")
    fields.choice("version", "format", "checkpoint_format", default="gemm", allowed=("gemm", "GEMM"))
    if quantisation.get("backend") == "llm-awq":
        fields.refuse("backend")  # the only one that stores words in another order
    symmetric = not fields.flag("zero_point", default=True)
    return CodesScheme("awq", LAYOUT, (read_option(fields, bits=(4,)),), symmetric)
