"""The experts of a layer on the slots of a device: which kernel with which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from gpu_cache.kernels.formats import FORMATS, block_bytes
from gpu_cache.kernels.grouping import tiles_of
from gpu_cache.kernels.tiles import few_down, few_gate_up, many_down, many_gate_up

BLOCK = 16  # output columns
FEW_ROWS = 16  # a step of at most so many rows streams weights; also the least that tensor cores multiply


@dataclass(frozen=True)
class Tiling:
    """What a program of a kernel has: a tile of `rows` rows and `blocks` blocks of output columns, both powers of two.

    warps, stages: of its loop, None for Triton's choice. A sum is one chain over the inputs in every tiling, but the
    compiler may multiply in other instructions, which add up in another order: bits compare within one tiling.
    """

    blocks: int
    rows: int
    warps: int | None = None
    stages: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Options of a kernel launch."""
        named = {"num_warps": self.warps, "num_stages": self.stages}
        return {name: value for name, value in named.items() if value is not None}


FEW, MANY = Tiling(blocks=1, rows=FEW_ROWS), Tiling(blocks=4, rows=64)  # many programs stream, wide ones multiply


@dataclass(frozen=True)
class ExpertLayout:
    """What the bytes of a slot are: gate and up interleaved by block, then down; biases in pieces of their own.

    activation: "silu" or "swiglu_clamped".
    """

    format: str
    hidden: int
    intermediate: int
    activation: str = "silu"
    bias: bool = False

    @property
    def hidden_stride(self) -> int:
        """Padded inputs of gate and up, and elements from one row of them to the next."""
        return _padded(self.hidden)

    @property
    def intermediate_stride(self) -> int:
        return _padded(self.intermediate)

    @property
    def gate_up_blocks(self) -> int:
        return -(-self.intermediate // BLOCK)

    @property
    def down_blocks(self) -> int:
        return -(-self.hidden // BLOCK)

    @property
    def down_offset(self) -> int:
        """Bytes from the start of an expert to its down matrix."""
        return 2 * self.gate_up_blocks * block_bytes(self.format, self.hidden_stride)

    @property
    def nbytes(self) -> int:
        return self.down_offset + self.down_blocks * block_bytes(self.format, self.intermediate_stride)


class ExpertKernels:
    """Runs experts on slots, in memory that is allocated once.

    activation: bf16 [pairs, intermediate_stride], whose padding stays zero. contributions: float32 [pairs,
    hidden_stride], what the expert of each (row, rank) made of the row; rows of pairs that are none of ours keep what
    they had.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        memory: Sequence[torch.Tensor],
        rows: int,
        top_k: int,
        few: Tiling = FEW,
        many: Tiling = MANY,
    ) -> None:
        """memory: uint8 [slots, bytes] of the matrices, then of the biases of gate and up and of down if there are any.
        rows: of a step at most. few, many: for steps of at most `FEW_ROWS` rows, all of which its tile holds, and of
        more.
        """
        assert few.rows >= FEW_ROWS
        self.layout, self.top_k, self._few_tiling, self._many_tiling = layout, top_k, few, many
        self._experts, self._biases = memory[0], list(memory[1:3]) if layout.bias else [memory[0], memory[0]]
        pairs, device = rows * top_k, memory[0].device
        self.activation = torch.zeros((pairs, layout.intermediate_stride), dtype=torch.bfloat16, device=device)
        self.contributions = torch.zeros((pairs, layout.hidden_stride), dtype=torch.float32, device=device)

    def run(self, x: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        """Returns `contributions`. x: bf16 [rows, hidden_stride], padded with zeros. slot_ids: int32 [rows, top_k],
        -1 for none of ours; a row names a slot once at most.

        Whether a step has few rows or many decides over the kernel, not how many of them hit: so an expert's result
        does not depend on what else is cached.
        """
        rows = len(slot_ids)
        if rows <= FEW_ROWS:
            self._few(x, slot_ids)
        else:
            self._many(x, slot_ids)
        return self.contributions[: rows * self.top_k]

    def _few(self, x: torch.Tensor, slot_ids: torch.Tensor) -> None:
        (rows, top_k), tiling = slot_ids.shape, self._few_tiling
        shape = {**self._shape(tiling), "TOP_K": top_k, "RANKS": triton.next_power_of_2(top_k)}
        gate_up, down = self._gate_up(x), self._down()
        activation = {"ACTIVATION": self.layout.activation}
        few_gate_up[self._grid(rows * top_k, gate_up, tiling)](slot_ids, rows, *gate_up, **activation, **shape)
        few_down[self._grid(rows * top_k, down, tiling)](slot_ids, rows, *down, **shape)

    def _many(self, x: torch.Tensor, slot_ids: torch.Tensor) -> None:
        tiling = self._many_tiling
        tiles, shape = tiles_of(slot_ids, len(self._experts), tiling.rows), self._shape(tiling)
        gate_up, down = self._gate_up(x), self._down()
        activation = {"ACTIVATION": self.layout.activation, "TOP_K": self.top_k}
        many_gate_up[self._grid(len(tiles.slot), gate_up, tiling)](*tiles, *gate_up, **activation, **shape)
        many_down[self._grid(len(tiles.slot), down, tiling)](*tiles, *down, **shape)

    def _grid(self, tiles: int, arguments: tuple[object, ...], tiling: Tiling) -> tuple[int, int]:
        columns = arguments[4]
        assert isinstance(columns, int)
        return tiles, -(-columns // tiling.blocks)

    def _shape(self, tiling: Tiling) -> dict[str, object]:
        """Constants and options of a launch."""
        format = self.layout.format
        of_format = {"FORMAT": format, "BIAS": self.layout.bias, "CHUNK": FORMATS[format].CHUNK}
        return {**of_format, "BLOCKS": tiling.blocks, "ROWS": tiling.rows, **tiling.options}

    def _gate_up(self, x: torch.Tensor) -> tuple[object, ...]:
        return self._matrix(x, 0, self.layout.gate_up_blocks, self.layout.hidden_stride, 0, self.activation)

    def _down(self) -> tuple[object, ...]:
        layout = self.layout
        width = layout.intermediate_stride
        return self._matrix(self.activation, layout.down_offset, layout.down_blocks, width, 1, self.contributions)

    def _matrix(
        self, x: torch.Tensor, offset: int, blocks: int, inputs: int, bias: int, out: torch.Tensor
    ) -> tuple[object, ...]:
        """The arguments that all kernels have, in their order."""
        format, experts, biases = self.layout.format, self._experts, self._biases[bias]
        size, header = block_bytes(format, inputs), FORMATS[format].header_bytes(inputs)
        slots = (experts[:, offset:], experts.stride(0), blocks, size, header, inputs)
        return x, x.stride(0), *slots, biases, biases.stride(0), out, out.stride(0)


def _padded(width: int) -> int:
    return -(-width // 64) * 64
