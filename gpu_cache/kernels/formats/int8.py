"""int8: a float32 scale a column, then lines of 16 columns by four inputs, stored with an offset."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INPUT_BYTES = 16
CHUNK = 64
OFFSET = tl.constexpr(128)


def header_bytes(inputs: int) -> int:
    return 64


def unpack(blocks: torch.Tensor, inputs: int) -> torch.Tensor:
    """float32 [blocks * 16, inputs] of uint8 [blocks, bytes]."""
    scales = blocks[:, :64].contiguous().view(torch.float32).reshape(-1, 1)
    lines = blocks[:, 64:].reshape(-1, inputs // 4, 16, 4)
    return (lines.permute(0, 2, 1, 3).reshape(-1, inputs).float() - 128) * scales


@triton.jit
def codes(lines, stride, count, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """float32 [CHUNK, BLOCKS * 16], whole numbers within 127; blocks beyond `count` are no weights."""
    block = tl.arange(0, BLOCKS)[:, None]
    stored = tl.load(lines + block * stride + tl.arange(0, CHUNK * 16)[None, :], mask=block < count, other=0)
    parts = tl.reshape(stored, (BLOCKS, CHUNK // 4, 16, 4))
    ordered = tl.reshape(tl.permute(parts, (1, 3, 0, 2)), (CHUNK, BLOCKS * 16))
    return ordered.to(tl.float32) - OFFSET


@triton.jit
def scales(blocks, stride, count, first, BLOCKS: tl.constexpr):
    """float32 [BLOCKS * 16], the same for every chunk."""
    block, column = tl.arange(0, BLOCKS)[:, None], tl.arange(0, 16)[None, :]
    at = (blocks + block * stride).to(tl.pointer_type(tl.float32)) + column
    return tl.reshape(tl.load(at, mask=block < count, other=0.0), (BLOCKS * 16,))
