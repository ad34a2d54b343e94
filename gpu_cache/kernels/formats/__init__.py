"""How each weight format lies in a slot. One file each: `codes` and `scales` for kernels, `unpack` as their reference.

A matrix is blocks of 16 output columns; a block is a header of scales and 64-byte lines, as `docs/kernels.md` has it.
Codes are exact in bf16, so tensor cores multiply them without rounding; scales are applied to sums in fp32.
"""

from __future__ import annotations

from types import ModuleType

from gpu_cache.kernels.formats import bf16, fp8, int4, int8, mxfp4

FORMATS: dict[str, ModuleType] = {"bf16": bf16, "fp8": fp8, "int4": int4, "int8": int8, "mxfp4": mxfp4}


def block_bytes(format: str, inputs: int) -> int:
    """Bytes of a block of 16 columns; inputs: padded."""
    module = FORMATS[format]
    return int(module.header_bytes(inputs) + inputs * module.INPUT_BYTES)
