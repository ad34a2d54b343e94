"""GPTQ: codes of a word lie along the inputs, zeros are stored one less than they are (but in its second version)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.schemes.codes import CodesScheme, read_group

WORDS = "gptq int4"


def read_scheme(quantisation: Mapping[str, Any]) -> CodesScheme:
    fields = Fields(quantisation, "quantization_config.")
    fields.size("bits", minimum=4, maximum=4)
    version = fields.choice("checkpoint_format", default="gptq", allowed=("gptq", "gptq_v2"))
    return CodesScheme(
        "qweight", "scales", "qzeros", ("g_idx",), read_group(fields),
        symmetric=fields.flag("sym", default=True), transposed=True, axis=0, zeros_less=int(version == "gptq"),
    )  # fmt: skip
