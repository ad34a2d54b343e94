"""Weight formats: one file each, found by name. What they share is in `block.py`."""

from __future__ import annotations

from typing import Protocol

from hybrid.formats.bf16 import Bf16
from hybrid.formats.block import Array, Bytes, Floats
from hybrid.formats.fp8 import Fp8
from hybrid.formats.fp8_row import Fp8Row
from hybrid.formats.grouped import Grouped
from hybrid.formats.halves import Scaled, ScaledFromMinimum
from hybrid.formats.int4 import Int4
from hybrid.formats.int8 import Int8
from hybrid.formats.mxfp4 import Mxfp4
from hybrid.formats.nvfp4 import Nvfp4
from hybrid.formats.rows import RowKind
from hybrid.formats.superblocks import ScaledAndLowered, ScaledAndLoweredSmallGroups, ScaledSmallGroups
from hybrid.formats.tabled import Tabled


class WeightFormat(Protocol):
    """How a matrix W [n outputs, k inputs] is stored: blocks of 16 output columns, each a header of scales and lines.

    rows: the kind of activations that it multiplies. integer: whether those are int8. row_group: rows that may share a
    scale, so a matrix packed in pieces must be cut at multiples of it. cut_inputs: packed blocks can be cut along k at
    multiples of it. `inputs` is always the padded k, a multiple of 64.
    """

    @property
    def name(self) -> str: ...
    @property
    def rows(self) -> RowKind: ...
    @property
    def integer(self) -> bool: ...
    @property
    def row_group(self) -> int: ...
    @property
    def cut_inputs(self) -> int: ...

    def header_bytes(self, inputs: int) -> int:
        """Bytes of a block that are no lines, a multiple of 64; a line of scales of 64 inputs among others is one."""

    def block_bytes(self, inputs: int) -> int:
        """Bytes of a block, a multiple of 64."""

    def pack(self, weight: Array) -> Bytes:
        """Blocks [blocks, block_bytes] of W [n, k] of bf16, fp16 or fp32, whose values must be finite."""

    def unpack(self, packed: Array, n: int, k: int) -> Floats:
        """What the packed bytes stand for, exactly: float32 [n, k]."""

    def cut(self, blocks: Bytes, inputs: int, first: int, last: int) -> Bytes:
        """Blocks [count, block_bytes] with inputs [first, last) alone, as if only these had been quantised.

        first is a multiple of `cut_inputs`; last is too, or else `inputs`.
        """

    def all_finite(self, blocks: Bytes, inputs: int) -> bool:
        """Whether no scale and no value of blocks [count, block_bytes] is NaN or infinite."""


# Those with a name of their own also pack what checkpoints publish.
INT8, INT4, FP8, FP8_ROW, MXFP4, NVFP4 = Int8(), Int4(), Fp8(), Fp8Row(), Mxfp4(), Nvfp4()
Q8_0 = Scaled("q8_0", 8)
Q4_0, Q5_0 = Scaled("q4_0", 4, 8), Scaled("q5_0", 5, 16)
Q4_1, Q5_1 = ScaledFromMinimum("q4_1", 4), ScaledFromMinimum("q5_1", 5)
Q4_K, Q5_K = ScaledAndLowered("q4_k", 4), ScaledAndLowered("q5_k", 5)
Q6_K = ScaledSmallGroups("q6_k", 6, 32)
Q2_K = ScaledAndLoweredSmallGroups("q2_k", 2)
Q4_T = Tabled("q4_t", 4, 7)
GROUPED: dict[str, Grouped] = {f.name: f for f in (Q8_0, Q4_0, Q5_0, Q4_1, Q5_1, Q4_K, Q5_K, Q6_K, Q4_T, Q2_K)}
_ALL: list[WeightFormat] = [Bf16(), INT8, INT4, FP8, MXFP4, FP8_ROW, NVFP4, *GROUPED.values()]
FORMATS: dict[str, WeightFormat] = {f.name: f for f in _ALL}
