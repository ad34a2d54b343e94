"""What every packed format shares: matrices are cut into blocks of 16 output columns, padded with zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 16  # output columns in a block
K_ALIGN = 64  # inputs are padded to this
LINE = 64  # bytes of a line, and what a block's header is padded to
GROUP = 32  # inputs that share a scale in int4 and mxfp4

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def padded(matrix: Array) -> Array:
    """[n, k] filled up with zeros to whole blocks [round_up(n, 16), round_up(k, 64)]."""
    n, k = matrix.shape
    missing = ((0, round_up(n, BLOCK) - n), (0, round_up(k, K_ALIGN) - k))
    return np.pad(matrix, missing) if any(map(any, missing)) else matrix


def padded_floats(weight: Array) -> Floats:
    """A matrix of bf16, fp16 or fp32 as float32, filled up with zeros to whole blocks."""
    floats: Floats = padded(weight).astype(np.float32, copy=False)
    return floats


def by_group(weight: Array) -> Floats:
    """[n, k] as [32, blocks, K / 32, 16]: the inputs of a group first, so that sums over them run over long rows."""
    rows = padded_floats(weight)
    grouped = rows.reshape(len(rows) // BLOCK, BLOCK, rows.shape[1] // GROUP, GROUP)
    return np.ascontiguousarray(grouped.transpose(3, 0, 2, 1))


def from_groups(grouped: Array, n: int, k: int) -> Array:
    """The inverse of `by_group`: [n, k] of [32, blocks, K / 32, 16]."""
    return np.ascontiguousarray(grouped.transpose(1, 3, 2, 0).reshape(grouped.shape[1] * BLOCK, -1)[:n, :k])


def interleaved(rows: Array, inputs: int) -> Array:
    """[n, K] bytes or words as [blocks, K / inputs, 16, inputs]: `inputs` of each column side by side."""
    blocks, k = len(rows) // BLOCK, rows.shape[1]
    words = rows.reshape(blocks, BLOCK, k // inputs, inputs)
    # moved as one word of `inputs` elements, which is several times faster than element by element
    word = np.dtype(f"u{inputs * rows.itemsize}")
    moved = np.ascontiguousarray(words.view(word)[..., 0].transpose(0, 2, 1))
    return moved.view(rows.dtype).reshape(blocks, k // inputs, BLOCK, inputs)


def separated(lines: Array, n: int, k: int) -> Array:
    """The inverse of `interleaved`: [n, k] of [blocks, K / inputs, 16, inputs]."""
    return np.ascontiguousarray(lines.transpose(0, 2, 1, 3).reshape(len(lines) * BLOCK, -1)[:n, :k])


def joined(header: Array, lines: Array) -> Bytes:
    """Blocks [blocks, header + lines] of headers, padded to whole lines already, and lines."""
    count = len(lines)
    return np.concatenate([array.reshape(count, -1).view(np.uint8) for array in (header, lines)], axis=1)


def in_blocks(packed: Array, n: int, block_bytes: int) -> Bytes:
    """Packed bytes of n output columns as [blocks, block_bytes]."""
    return np.ascontiguousarray(packed).view(np.uint8).reshape(round_up(n, BLOCK) // BLOCK, block_bytes)


def cut_lines(blocks: Bytes, header_bytes: int, inputs: int, first: int, last: int) -> Bytes:
    """A view of the lines that hold inputs [first, last) of blocks [count, header_bytes + lines]."""
    input_bytes = (blocks.shape[1] - header_bytes) // inputs
    return blocks[:, header_bytes + first * input_bytes : header_bytes + last * input_bytes]


def all_finite(values: npt.NDArray[np.generic]) -> bool:
    """Whether no value is NaN or infinite, of float32, float16, bf16 or bf16 bit patterns (uint16)."""
    kind = values.dtype
    exponent = {np.dtype(np.float32): 0x7F80_0000, np.dtype(np.float16): 0x7C00}.get(kind, 0x7F80)
    bits: Array = values.view(np.uint32 if kind.itemsize == 4 else np.uint16)
    return bits.size == 0 or bool(np.max(bits & exponent) < exponent)
