"""mxfp4 (e2m1): for each 128 inputs a line of scales, a power of two a column and 32 inputs, and sixteen of 16 columns
by eight inputs in four bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INPUT_BYTES = 8
CHUNK = 32  # those that share a scale
VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def header_bytes(inputs: int) -> int:
    """Of scales, which lie among the lines."""
    return -(-inputs // 128) * 64


def unpack(blocks: torch.Tensor, inputs: int) -> torch.Tensor:
    """float32 [blocks * 16, inputs] of uint8 [blocks, bytes]."""
    whole = -(-inputs // 128)
    parts = torch.nn.functional.pad(blocks, (0, whole * 1088 - blocks.shape[1])).reshape(len(blocks), whole, 1088)
    exponents = parts[..., :64].reshape(len(blocks), whole * 4, 16).permute(0, 2, 1).int() - 127
    lines = parts[..., 64:].reshape(len(blocks), whole * 16, 16, 4)
    codes = torch.stack([lines & 15, lines >> 4], dim=3).permute(0, 2, 1, 3, 4)  # [blocks, 16, K / 8, half, byte]
    values = torch.tensor(VALUES, device=blocks.device)[codes.reshape(len(blocks), 16, whole * 4, 32).int()]
    # a double, whose powers of two are exact down to the smallest exponent
    scaled = values.double() * torch.exp2(exponents.double())[..., None]
    return scaled.float().reshape(len(blocks) * 16, whole * 128)[:, :inputs]


@triton.jit
def codes(blocks, stride, count, first, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """float32 [CHUNK, BLOCKS * 16] of the inputs from `first` on; blocks beyond `count` are zero.

    The bits of e2m1 are those of a half 2^14 times as small, the subnormal one too.
    """
    block, lines = tl.arange(0, BLOCKS)[:, None], blocks + first // 128 * 1088 + 64 + first % 128 * 8
    stored = tl.load(lines + block * stride + tl.arange(0, CHUNK * 8)[None, :], mask=block < count, other=0)
    halves = tl.reshape(tl.join(stored & 15, stored >> 4), (BLOCKS, CHUNK // 8, 16, 4, 2))
    bits = tl.reshape(tl.permute(halves, (1, 4, 3, 0, 2)), (CHUNK, BLOCKS * 16)).to(tl.uint16)
    half = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def scales(blocks, stride, count, first, BLOCKS: tl.constexpr):
    """float32 [BLOCKS * 16] of the inputs from `first` on: 2^(exponent - 127), put together from its bits."""
    block, column = tl.arange(0, BLOCKS)[:, None], tl.arange(0, 16)[None, :]
    line = blocks + block * stride + first // 128 * 1088 + first % 128 // 32 * 16
    exponent = tl.load(line + column, mask=block < count, other=127).to(tl.int32)
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)  # 2^-127 is subnormal
    return tl.reshape(bits.to(tl.float32, bitcast=True), (BLOCKS * 16,))
