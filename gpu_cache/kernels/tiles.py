"""Kernels over tiles of rows that share an expert: gate, up and activation, then down.

A program has one tile and BLOCKS blocks of output columns. With few rows (`few_`) it finds its tile on the spot, with
many (`many_`) the tile comes from a list of pairs sorted by slot. A pair is (row, rank), row * top_k + rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_cache.kernels.product import activate, product

# Arguments of every kernel. x, x_stride: bf16 rows to multiply, in elements. experts, slot_bytes: the slots. blocks: of
# output columns in the matrix; block_bytes, header, inputs: of each. bias, bias_bytes: of the slots, unread if no BIAS.


@triton.jit
def _few(slot_ids, rows, TOP_K: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr):
    """(slot, pairs [ROWS], which of them are there) of the program's pair: nothing, unless it is the first of its slot.

    A row takes a slot once at most, so a tile has at most one pair of each row.
    """
    pair = tl.program_id(0)
    slot = tl.load(slot_ids + pair)
    row, rank = tl.arange(0, ROWS), tl.arange(0, RANKS)
    there = (row < rows)[:, None] & (rank < TOP_K)[None, :]
    # `where`, because the interpreter makes no mask of a scalar & a block
    same = tl.load(slot_ids + row[:, None] * TOP_K + rank[None, :], mask=there, other=-1) == slot
    found = tl.where(slot >= 0, same, False)
    mine = tl.max(found.to(tl.int32), axis=1) > 0
    first = tl.min(tl.where(mine, row, ROWS), axis=0)
    pairs = row * TOP_K + tl.max(tl.where(found, rank[None, :], 0), axis=1)
    return slot, pairs, tl.where(first == pair // TOP_K, mine, False)


@triton.jit
def _many(tile_slot, tile_first, tile_last, order, ROWS: tl.constexpr):
    tile = tl.program_id(0)
    at = tl.load(tile_first + tile) + tl.arange(0, ROWS)
    mine = at < tl.load(tile_last + tile)
    return tl.load(tile_slot + tile), tl.load(order + at, mask=mine, other=0), mine


@triton.jit
def _gate_up(
    slot, pairs, mine, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs, bias, bias_bytes, out,
    out_stride, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Blocks of gate and up lie in turn: gate 0, up 0, gate 1, ..., their biases too."""
    first = tl.program_id(1) * BLOCKS
    count = blocks - first
    rows = x + (pairs // TOP_K).to(tl.int64)[:, None] * x_stride
    at = experts + slot.to(tl.int64) * slot_bytes + 2 * first * block_bytes
    gate = product(rows, mine, at, 2 * block_bytes, header, count, inputs, FORMAT, BLOCKS, CHUNK)
    up = product(rows, mine, at + block_bytes, 2 * block_bytes, header, count, inputs, FORMAT, BLOCKS, CHUNK)
    column = tl.arange(0, BLOCKS * 16)
    inside = column < count * 16
    if BIAS:
        both = (bias + slot.to(tl.int64) * bias_bytes).to(tl.pointer_type(tl.float32))
        place = both + (first + column // 16) * 32 + column % 16
        gate += tl.load(place, mask=inside, other=0.0)[None, :]
        up += tl.load(place + 16, mask=inside, other=0.0)[None, :]
    to = out + pairs.to(tl.int64)[:, None] * out_stride + (first * 16 + column)[None, :]
    tl.store(to, activate(gate, up, ACTIVATION).to(tl.bfloat16), mask=mine[:, None] & inside[None, :])


@triton.jit
def _down(
    slot, pairs, mine, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs, bias, bias_bytes, out,
    out_stride, FORMAT: tl.constexpr, BIAS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Unweighted, each pair into a row of its own. experts: at the down matrix of slot 0."""
    first = tl.program_id(1) * BLOCKS
    count = blocks - first
    rows = x + pairs.to(tl.int64)[:, None] * x_stride
    at = experts + slot.to(tl.int64) * slot_bytes + first * block_bytes
    sums = product(rows, mine, at, block_bytes, header, count, inputs, FORMAT, BLOCKS, CHUNK)
    column = tl.arange(0, BLOCKS * 16)
    inside = column < count * 16
    if BIAS:
        place = (bias + slot.to(tl.int64) * bias_bytes).to(tl.pointer_type(tl.float32)) + first * 16 + column
        sums += tl.load(place, mask=inside, other=0.0)[None, :]
    to = out + pairs.to(tl.int64)[:, None] * out_stride + (first * 16 + column)[None, :]
    tl.store(to, sums, mask=mine[:, None] & inside[None, :])


@triton.jit
def few_gate_up(
    slot_ids, row_count, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs, bias, bias_bytes, out,
    out_stride, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, TOP_K: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    slot, pairs, mine = _few(slot_ids, row_count, TOP_K, RANKS, ROWS)
    if tl.max(mine.to(tl.int32), axis=0) > 0:
        _gate_up(
            slot, pairs, mine, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs, bias, bias_bytes,
            out, out_stride, FORMAT, ACTIVATION, BIAS, TOP_K, BLOCKS, CHUNK,
        )  # fmt: skip


@triton.jit
def few_down(
    slot_ids, row_count, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs, bias, bias_bytes, out,
    out_stride, FORMAT: tl.constexpr, BIAS: tl.constexpr, TOP_K: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    slot, pairs, mine = _few(slot_ids, row_count, TOP_K, RANKS, ROWS)
    if tl.max(mine.to(tl.int32), axis=0) > 0:
        _down(
            slot, pairs, mine, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs, bias, bias_bytes,
            out, out_stride, FORMAT, BIAS, BLOCKS, CHUNK,
        )  # fmt: skip


@triton.jit
def many_gate_up(
    tile_slot, tile_first, tile_last, order, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs,
    bias, bias_bytes, out, out_stride, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    slot, pairs, mine = _many(tile_slot, tile_first, tile_last, order, ROWS)
    if slot >= 0:
        _gate_up(
            slot, pairs, mine, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs, bias, bias_bytes,
            out, out_stride, FORMAT, ACTIVATION, BIAS, TOP_K, BLOCKS, CHUNK,
        )  # fmt: skip


@triton.jit
def many_down(
    tile_slot, tile_first, tile_last, order, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs,
    bias, bias_bytes, out, out_stride, FORMAT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    slot, pairs, mine = _many(tile_slot, tile_first, tile_last, order, ROWS)
    if slot >= 0:
        _down(
            slot, pairs, mine, x, x_stride, experts, slot_bytes, blocks, block_bytes, header, inputs, bias, bias_bytes,
            out, out_stride, FORMAT, BIAS, BLOCKS, CHUNK,
        )  # fmt: skip
