"""int4: for each 64 inputs a line of scales, bf16 of a column and 32 inputs, and eight of 16 columns by eight inputs in
four bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INPUT_BYTES = 9
CHUNK = 32  # those that share a scale
OFFSET = tl.constexpr(8)


def header_bytes(inputs: int) -> int:
    return 0


def unpack(blocks: torch.Tensor, inputs: int) -> torch.Tensor:
    """float32 [blocks * 16, inputs] of uint8 [blocks, bytes]."""
    parts = blocks.reshape(len(blocks), inputs // 64, 576)
    scales = parts[..., :64].contiguous().view(torch.bfloat16).float().reshape(-1, inputs // 32, 16)
    lines = parts[..., 64:].reshape(-1, inputs // 8, 16, 4)
    values = torch.stack([lines & 15, lines >> 4], dim=3).permute(0, 2, 1, 3, 4)  # [blocks, 16, K / 8, half, byte]
    values = values.reshape(len(blocks), 16, inputs // 32, 32).float() - 8
    return (values * scales.permute(0, 2, 1)[..., None]).reshape(-1, inputs)


@triton.jit
def codes(blocks, stride, count, first, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """float32 [CHUNK, BLOCKS * 16], whole numbers from -8 to 7, of the inputs from `first` on; blocks beyond `count`
    are no weights.
    """
    block, lines = tl.arange(0, BLOCKS)[:, None], blocks + first // 64 * 576 + 64 + first % 64 * 8
    stored = tl.load(lines + block * stride + tl.arange(0, CHUNK * 8)[None, :], mask=block < count, other=0)
    halves = tl.reshape(tl.join(stored & 15, stored >> 4), (BLOCKS, CHUNK // 8, 16, 4, 2))
    ordered = tl.reshape(tl.permute(halves, (1, 4, 3, 0, 2)), (CHUNK, BLOCKS * 16))
    return ordered.to(tl.float32) - OFFSET


@triton.jit
def scales(blocks, stride, count, first, BLOCKS: tl.constexpr):
    """float32 [BLOCKS * 16] of the inputs from `first` on."""
    block, column = tl.arange(0, BLOCKS)[:, None], tl.arange(0, 16)[None, :]
    line = blocks + block * stride + first // 64 * 576 + first % 64
    at = line.to(tl.pointer_type(tl.bfloat16)) + column
    return tl.reshape(tl.load(at, mask=block < count, other=0.0).to(tl.float32), (BLOCKS * 16,))
