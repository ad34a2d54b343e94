"""What a memory node holds of a tensor: some of its blocks, cut out of the packed bytes without packing again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK, K_ALIGN, Array, Bytes, round_up
from hybrid.formats.packed import matrix_formats
from hybrid.models.tensors import Gated, StoreTensor

# By the name of a tensor, the blocks that each node holds: of a matrix its output columns, of experts and the biases
# of gate and up the intermediate ones. What is not named here is whole.
Parts = Mapping[str, tuple[range, ...]]


def column_parts(blocks: int, nodes: int) -> tuple[range, ...]:
    """Blocks of output columns, as equal as can be; () if there are fewer than nodes."""
    return _cut(blocks, 1, nodes)


def intermediate_parts(format: str, blocks: int, nodes: int) -> tuple[range, ...]:
    """Blocks of an intermediate dimension, which must also be a boundary of the inputs of down; () if too few."""
    return _cut(blocks, FORMATS[matrix_formats(format)[1]].cut_inputs // BLOCK, nodes)


def _cut(blocks: int, unit: int, nodes: int) -> tuple[range, ...]:
    units = -(-blocks // unit)
    edges = [min(blocks, units * i // nodes * unit) for i in range(nodes + 1)]
    return tuple(map(range, edges, edges[1:])) if units >= nodes else ()


def held_bytes(tensor: StoreTensor, parts: Parts) -> int:
    """Bytes of a tensor over all nodes, including scales duplicated on every node."""
    pieces = parts.get(tensor.name, ())
    return sum(part_bytes(tensor, blocks) for blocks in pieces) if pieces else tensor.nbytes


def part_bytes(tensor: StoreTensor, blocks: range) -> int:
    """Bytes of the part of a tensor with these blocks."""
    if len(tensor.runs) < 2:
        return tensor.nbytes // _count(tensor) * len(blocks)
    assert tensor.format is not None
    return int(np.prod(tensor.shape[:-1])) * expert_part_bytes(tensor, blocks)


def expert_part_bytes(tensor: StoreTensor, blocks: range) -> int:
    """Bytes of the part of one expert: gate and up, then down."""
    format = FORMATS[matrix_formats(tensor.format or "")[1]]
    return down_part_offset(tensor, blocks) + tensor.runs[1].count * format.block_bytes(part_inputs(blocks))


def down_part_offset(tensor: StoreTensor, blocks: range) -> int:
    """Bytes from the start of an expert's part to its down matrix."""
    format = FORMATS[matrix_formats(tensor.format or "")[0]]
    return _wide(tensor) * len(blocks) * format.block_bytes(tensor.runs[0].inputs)


def part_inputs(blocks: range) -> int:
    """Padded inputs of the part of down that takes what these blocks of gate and up make."""
    return round_up(len(blocks) * BLOCK, K_ALIGN)


def write_part(tensor: StoreTensor, array: npt.NDArray[Any], blocks: range, out: Bytes) -> None:
    """Write the part of a tensor, as the store has it, to `out` [part_bytes]."""
    if len(tensor.runs) == 2:
        return _write_experts(tensor, array.reshape(-1, array.shape[-1]), blocks, out)
    chosen = slice(blocks.start, blocks.stop)
    part = array.reshape(_count(tensor), -1)[chosen] if tensor.runs else array[:, chosen]
    out.view(part.dtype).reshape(part.shape)[...] = part


def _write_experts(tensor: StoreTensor, blobs: Array, blocks: range, out: Bytes) -> None:
    wide, format = (FORMATS[name] for name in matrix_formats(tensor.format or ""))
    gate_up, down = tensor.runs
    each = _wide(tensor)
    size, first, start = wide.block_bytes(gate_up.inputs), blocks.start * BLOCK, down_part_offset(tensor, blocks)
    last = first + part_inputs(blocks)
    for blob, part in zip(blobs, out.reshape(len(blobs), -1), strict=True):
        part[:start] = blob[each * blocks.start * size : each * blocks.stop * size]
        whole = blob[gate_up.count * size :].reshape(down.count, -1)
        part[start:] = format.cut(whole, down.inputs, first, last).reshape(-1)


def _wide(tensor: StoreTensor) -> int:
    """Matrices of an expert before down."""
    assert isinstance(tensor.origin, Gated)
    return tensor.origin.wide


def _count(tensor: StoreTensor) -> int:
    """Blocks of a matrix, or those of each expert in the biases [experts, blocks, ...] of gate and up."""
    return tensor.runs[0].count if tensor.runs else tensor.shape[1]
