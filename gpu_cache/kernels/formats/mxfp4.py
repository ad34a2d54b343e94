"""mxfp4 (e2m1): a power of two a column and 32 inputs, then lines of four pairs of inputs by 16 columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INPUT_BYTES = 8
CHUNK = 32  # those that share a scale
VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def header_bytes(inputs: int) -> int:
    return -(-inputs // 2 // 64) * 64


def unpack(blocks: torch.Tensor, inputs: int) -> torch.Tensor:
    """float32 [blocks * 16, inputs] of uint8 [blocks, bytes]."""
    exponents = blocks[:, : inputs // 2].reshape(-1, inputs // 32, 16).permute(0, 2, 1).int() - 127
    lines = blocks[:, header_bytes(inputs) :].reshape(-1, inputs // 2, 16)
    pairs = torch.stack([lines & 15, lines >> 4], dim=2).reshape(-1, inputs, 16).permute(0, 2, 1)
    values = torch.tensor(VALUES, device=blocks.device)[pairs.int()]
    # a double, whose powers of two are exact down to the smallest exponent
    return (values.double() * torch.exp2(exponents.double()).repeat_interleave(32, dim=2)).float().reshape(-1, inputs)


@triton.jit
def codes(lines, stride, count, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """float32 [CHUNK, BLOCKS * 16]; blocks beyond `count` are zero.

    The bits of e2m1 are those of a half 2^14 times as small, the subnormal one too.
    """
    block = tl.arange(0, BLOCKS)[:, None]
    stored = tl.load(lines + block * stride + tl.arange(0, CHUNK * 8)[None, :], mask=block < count, other=0)
    pairs = tl.reshape(tl.join(stored & 15, stored >> 4), (BLOCKS, CHUNK // 2, 16, 2))
    bits = tl.reshape(tl.permute(pairs, (1, 3, 0, 2)), (CHUNK, BLOCKS * 16)).to(tl.uint16)
    half = (((bits & 8) << 12) | ((bits & 7) << 9)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def scales(blocks, stride, count, first, BLOCKS: tl.constexpr):
    """float32 [BLOCKS * 16] of the inputs from `first` on: 2^(exponent - 127), put together from its bits."""
    block, column = tl.arange(0, BLOCKS)[:, None], tl.arange(0, 16)[None, :]
    exponent = tl.load(blocks + block * stride + first // 32 * 16 + column, mask=block < count, other=127).to(tl.int32)
    bits = tl.where(exponent == 0, 1 << 22, exponent << 23)  # 2^-127 is subnormal
    return tl.reshape(bits.to(tl.float32, bitcast=True), (BLOCKS * 16,))
