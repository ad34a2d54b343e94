"""bf16: no scales, lines of 16 columns by two inputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INPUT_BYTES = 32  # of one input of the 16 columns of a block
CHUNK = 64  # inputs multiplied at a time


def header_bytes(inputs: int) -> int:
    return 0


def unpack(blocks: torch.Tensor, inputs: int) -> torch.Tensor:
    """float32 [blocks * 16, inputs] of uint8 [blocks, bytes]."""
    lines = blocks.view(torch.bfloat16).reshape(-1, inputs // 2, 16, 2)
    return lines.permute(0, 2, 1, 3).reshape(-1, inputs).float()


@triton.jit
def codes(lines, stride, count, BLOCKS: tl.constexpr, CHUNK: tl.constexpr):
    """bf16 [CHUNK, BLOCKS * 16] from the first line of a chunk; blocks beyond `count` are zero."""
    block = tl.arange(0, BLOCKS)[:, None]
    inside = tl.arange(0, CHUNK * 16)[None, :]
    values = tl.load((lines + block * stride).to(tl.pointer_type(tl.bfloat16)) + inside, mask=block < count, other=0.0)
    parts = tl.reshape(values, (BLOCKS, CHUNK // 2, 16, 2))
    return tl.reshape(tl.permute(parts, (1, 3, 0, 2)), (CHUNK, BLOCKS * 16))
