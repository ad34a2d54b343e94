"""The weighted sum of a row's experts, in ascending order of the experts: one order, whatever slots they lie in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 256  # that a program adds
_NO_EXPERT = tl.constexpr(2147483647)


def weighted_sums(
    contributions: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, slot_ids: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """out, float32 [rows, width]: for each row the sum of weight * contribution over the ranks whose slot is not -1.

    contributions: float32 [rows * top_k, width]. ids, slot_ids: int32 [rows, top_k]; weights: float32 [rows, top_k].
    """
    rows, top_k = ids.shape
    width = out.shape[1]
    grid = (rows, -(-width // _COLUMNS))
    shape = {"TOP_K": top_k, "RANKS": triton.next_power_of_2(top_k), "COLUMNS": _COLUMNS}
    _sum[grid](
        contributions, contributions.stride(0), ids, weights, slot_ids, out, out.stride(0), width, **shape
    )  # fmt: skip
    return out


@triton.jit
def _sum(
    contributions, stride, ids, weights, slot_ids, out, out_stride, width, TOP_K: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    at = row * TOP_K + rank
    slots = tl.load(slot_ids + at, mask=rank < TOP_K, other=-1)
    experts = tl.where(slots >= 0, tl.load(ids + at, mask=rank < TOP_K, other=0), _NO_EXPERT)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for _ in range(TOP_K):
        least = tl.min(experts, axis=0)
        chosen = experts == least
        there = least != _NO_EXPERT
        pair = row * TOP_K + tl.max(tl.where(chosen, rank, 0), axis=0)
        inside = tl.where(there, column < width, False)
        values = tl.load(contributions + pair.to(tl.int64) * stride + column, mask=inside, other=0.0)
        weight = tl.load(weights + pair, mask=there, other=0.0)
        sums += weight * values
        experts = tl.where(chosen, _NO_EXPERT, experts)
    tl.store(out + row.to(tl.int64) * out_stride + column, sums, mask=column < width)
