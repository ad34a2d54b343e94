"""fp8 (e4m3): a float32 scale each 128 inputs of a block of 16 columns, then lines of four inputs by 16 columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INPUT_BYTES = 16
CHUNK = 64
SQUARE = tl.constexpr(128)  # inputs that share a scale


def header_bytes(inputs: int) -> int:
    return -(-(-(-inputs // 128) * 4) // 64) * 64


def unpack(blocks: torch.Tensor, inputs: int) -> torch.Tensor:
    """float32 [blocks * 16, inputs] of uint8 [blocks, bytes]."""
    start = header_bytes(inputs)
    scales = blocks[:, :start].contiguous().view(torch.float32).repeat_interleave(128, dim=1)[:, None, :inputs]
    values = blocks[:, start:].contiguous().view(torch.float8_e4m3fn).float().reshape(-1, inputs, 16)
    return (values.permute(0, 2, 1) * scales).reshape(-1, inputs)


@triton.jit
def codes(lines, stride, count, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """float32 [CHUNK, BLOCKS * 16]; blocks beyond `count` are zero.

    The bits of e4m3 are those of a half a 256th as large, subnormal ones too: no GPU needs to know the format.
    """
    block = tl.arange(0, BLOCKS)[:, None]
    stored = tl.load(lines + block * stride + tl.arange(0, CHUNK * 16)[None, :], mask=block < count, other=0)
    parts = tl.reshape(stored, (BLOCKS, CHUNK, 16))
    bits = tl.reshape(tl.permute(parts, (1, 0, 2)), (CHUNK, BLOCKS * 16)).to(tl.uint16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def scales(blocks, stride, count, first, BLOCKS: tl.constexpr):
    """float32 [BLOCKS * 16] of the inputs from `first` on."""
    block = tl.arange(0, BLOCKS)[:, None] + tl.arange(0, 16)[None, :] * 0
    at = (blocks + block * stride).to(tl.pointer_type(tl.float32)) + first // SQUARE
    return tl.reshape(tl.load(at, mask=block < count, other=0.0), (BLOCKS * 16,))
