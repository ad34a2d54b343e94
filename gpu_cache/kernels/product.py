"""The product that every expert is made of: rows times packed blocks, and what happens to its sums."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from gpu_cache.kernels.formats import bf16, fp8, int4, int8, mxfp4

# In the interpreter `tl.dot` does not know bf16; fp32 holds the same operands, and products of them exactly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
bf16_codes, int8_codes, int4_codes = bf16.codes, int8.codes, int4.codes
fp8_codes, mxfp4_codes = fp8.codes, mxfp4.codes
int8_scales, int4_scales, fp8_scales, mxfp4_scales = int8.scales, int4.scales, fp8.scales, mxfp4.scales
GATE_LIMIT, GATE_SLOPE = tl.constexpr(7.0), tl.constexpr(1.702)


@triton.jit
def product(
    x, mine, blocks, stride, header, count, inputs, FORMAT: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr
):
    """float32 [ROWS, BLOCKS * 16]: rows times `count` of BLOCKS blocks of packed weights.

    x: pointers [ROWS, 1] to bf16 rows of `inputs` elements; rows that are not `mine` count as zero. blocks: pointer to
    the first block; stride: bytes from one to the next; header: bytes before the lines of each. A chunk of inputs has
    one scale a column, so sums are one chain over chunks in ascending order, whatever other rows there are.
    """
    sums = tl.zeros((x.shape[0], BLOCKS * 16), tl.float32)
    bytes_of_input: tl.constexpr = 32 if FORMAT == "bf16" else 16
    for first in range(0, inputs, CHUNK):
        rows = tl.load(x + first + tl.arange(0, CHUNK)[None, :], mask=mine[:, None], other=0.0)
        lines = blocks + header + first * bytes_of_input
        if FORMAT == "bf16":
            sums = _dot(rows, bf16_codes(lines, stride, count, BLOCKS, CHUNK), sums)
        elif FORMAT == "int8":
            sums = _dot(rows, int8_codes(lines, stride, count, BLOCKS, CHUNK), sums)
        else:
            nothing = tl.zeros((x.shape[0], BLOCKS * 16), tl.float32)
            if FORMAT == "int4":
                part = _dot(rows, int4_codes(blocks, stride, count, first, BLOCKS, CHUNK), nothing)
                sums += part * int4_scales(blocks, stride, count, first, BLOCKS)[None, :]
            elif FORMAT == "fp8":
                part = _dot(rows, fp8_codes(lines, stride, count, BLOCKS, CHUNK), nothing)
                sums += part * fp8_scales(blocks, stride, count, first, BLOCKS)[None, :]
            else:
                part = _dot(rows, mxfp4_codes(blocks, stride, count, first, BLOCKS, CHUNK), nothing)
                sums += part * mxfp4_scales(blocks, stride, count, first, BLOCKS)[None, :]
    if FORMAT == "int8":
        sums *= int8_scales(blocks, stride, count, 0, BLOCKS)[None, :]
    return sums


@triton.jit
def _dot(rows, codes, sums):
    if INTERPRETED:
        return sums + tl.dot(rows.to(tl.float32), codes.to(tl.float32))
    return tl.dot(rows, codes.to(tl.bfloat16), sums)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """silu, or gpt-oss's: gate at most 7, up within 7; gate * sigmoid(1.702 gate) * (up + 1).

    Zero times a value is added to what a bound made of it: of NaN and infinity no number must become.
    """
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate)) * up
    g = tl.minimum(gate, GATE_LIMIT) + gate * 0.0
    u = tl.minimum(tl.maximum(up, -GATE_LIMIT), GATE_LIMIT) + up * 0.0
    return g / (1.0 + tl.exp(-g * GATE_SLOPE)) * (u + 1.0)
