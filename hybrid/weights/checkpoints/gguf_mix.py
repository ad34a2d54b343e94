"""Which packed formats hold the types of GGUF files exactly."""

from __future__ import annotations

from collections.abc import Mapping

from hybrid.formats.mix import FormatMix
from hybrid.models.spec import ModelSpec
from hybrid.weights.checkpoints.exact_mix import Kind, Kinds, exact_mix
from hybrid.weights.checkpoints.gguf_tabled import TABLED
from hybrid.weights.shard import Entry

HOLDS = {
    "Q4_0": ("q4_0", "q5_0", "q8_0"), "Q5_0": ("q5_0", "q8_0"), "Q8_0": ("q8_0",), "Q4_1": ("q4_1", "q5_1"),
    "Q5_1": ("q5_1",), "Q4_K": ("q4_k", "q5_k"), "Q5_K": ("q5_k",), "Q6_K": ("q6_k",), "MXFP4": ("mxfp4",),
    "NVFP4": ("nvfp4",), "IQ4_NL": ("q8_0",), "Q2_K": ("q2_k",),
    **dict.fromkeys(TABLED, ("q4_t",)), **dict.fromkeys(("Q3_K", "IQ3_S"), ("q4_t", "q6_k")),
}  # fmt: skip
_FLOATS = ("F32", "F16", "BF16")


def gguf_mix(spec: ModelSpec, entries: Mapping[str, Entry]) -> FormatMix:
    """The formats in which a file's tensors lose nothing."""
    return exact_mix(spec, gguf_kinds(entries))


def type_kind(type: str, rows: int) -> Kind:
    """How a tensor of this type is stored."""
    return Kind("" if type in _FLOATS else type, HOLDS.get(type, ()), rows)


def gguf_kinds(entries: Mapping[str, Entry]) -> Kinds:
    """How the tensors of a file are stored, by name."""

    def kind(name: str) -> Kind | None:
        found = entries.get(name)
        return type_kind(found.dtype, found.shape[0]) if found and found.shape else None  # it is refused without rows

    return kind
