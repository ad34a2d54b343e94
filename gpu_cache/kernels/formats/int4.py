"""int4: a bf16 scale a column and 32 inputs, then lines of 16 columns by eight inputs in four bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INPUT_BYTES = 8
CHUNK = 32  # those that share a scale
OFFSET = tl.constexpr(8)


def header_bytes(inputs: int) -> int:
    return inputs


def unpack(blocks: torch.Tensor, inputs: int) -> torch.Tensor:
    """float32 [blocks * 16, inputs] of uint8 [blocks, bytes]."""
    scales = blocks[:, :inputs].contiguous().view(torch.bfloat16).float().reshape(-1, inputs // 32, 16)
    lines = blocks[:, inputs:].reshape(-1, inputs // 8, 16, 4)
    values = torch.stack([lines & 15, lines >> 4], dim=3).permute(0, 2, 1, 3, 4)  # [blocks, 16, K / 8, half, byte]
    values = values.reshape(len(blocks), 16, inputs // 32, 32).float() - 8
    return (values * scales.permute(0, 2, 1)[..., None]).reshape(-1, inputs)


@triton.jit
def codes(lines, stride, count, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """float32 [CHUNK, BLOCKS * 16], whole numbers from -8 to 7; blocks beyond `count` are no weights."""
    block = tl.arange(0, BLOCKS)[:, None]
    stored = tl.load(lines + block * stride + tl.arange(0, CHUNK * 8)[None, :], mask=block < count, other=0)
    halves = tl.reshape(tl.join(stored & 15, stored >> 4), (BLOCKS, CHUNK // 8, 16, 4, 2))
    ordered = tl.reshape(tl.permute(halves, (1, 4, 3, 0, 2)), (CHUNK, BLOCKS * 16))
    return ordered.to(tl.float32) - OFFSET


@triton.jit
def scales(blocks, stride, count, first, BLOCKS: tl.constexpr):
    """float32 [BLOCKS * 16] of the inputs from `first` on."""
    block, column = tl.arange(0, BLOCKS)[:, None], tl.arange(0, 16)[None, :]
    at = (blocks + block * stride).to(tl.pointer_type(tl.bfloat16)) + first // 32 * 16 + column
    return tl.reshape(tl.load(at, mask=block < count, other=0.0).to(tl.float32), (BLOCKS * 16,))
