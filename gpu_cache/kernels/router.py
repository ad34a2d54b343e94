"""From router logits to the experts of a row and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class TopK:
    """How a row chooses. kind: "softmax" over all, then the largest; "topk_softmax": softmax over the chosen;
    "sigmoid": sigmoid scores, chosen by score + correction; "sparsemixer" (Phi-3.5-MoE): one after the other the
    largest logit, its weight by a softmax over those left that are within 2 * jitter of it, relative to their size.
    groups: of experts, as many in each; only those of the best `top_groups` are chosen among, by the largest score of a
    group, or by the sum of its two largest sigmoids and corrections. renormalise: weights sum to `scale`; for
    topk_softmax they always do, for sparsemixer never.
    """

    kind: str
    experts: int
    top_k: int
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0


def choose(
    logits: torch.Tensor, top: TopK, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32, weights float32), each [rows, top_k], the best first; of equal ones the lowest id. A row with a logit
    or correction that is NaN or infinite gets the first experts with weights of NaN.

    logits: float32 [rows, at least experts]. correction: float32 [experts], added to scores for the choice
    alone.
    """
    rows = len(logits)
    ids = torch.empty((rows, top.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((rows, top.top_k), dtype=torch.float32, device=logits.device)
    _choose[(rows,)](
        logits, logits.stride(0), logits if correction is None else correction, ids, weights, top.scale,
        2 * top.jitter,
        KIND=top.kind, EXPERTS=top.experts, WIDTH=triton.next_power_of_2(top.experts), TOP_K=top.top_k,
        RANKS=triton.next_power_of_2(top.top_k), RENORMALISE=top.renormalise, CORRECTED=correction is not None,
        GROUPS=top.groups, TOP_GROUPS=top.top_groups,
    )  # fmt: skip
    return ids, weights


@triton.jit
def _choose(
    logits, stride, correction, ids, weights, scale, margin, KIND: tl.constexpr, EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, RANKS: tl.constexpr, RENORMALISE: tl.constexpr, CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
):  # fmt: skip
    row, expert = tl.program_id(0), tl.arange(0, WIDTH)
    there = expert < EXPERTS
    x = tl.load(logits + row * stride + expert, mask=there, other=-float("inf"))
    if KIND == "softmax":
        scores = tl.exp(x - tl.max(x, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    elif KIND == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        scores = x
    keys, damaged = scores, _is_damaged(x, there)
    if CORRECTED:
        corrections = tl.load(correction + expert, mask=there, other=0.0)
        keys += corrections
        damaged = damaged | _is_damaged(corrections, there)
    keys = tl.where(there, keys, -float("inf"))
    if GROUPS > 1:
        keys = _within_groups(keys, expert, EXPERTS // GROUPS, GROUPS, TOP_GROUPS, KIND == "sigmoid")
    rank = tl.arange(0, RANKS)
    chosen, values = tl.zeros((RANKS,), tl.int32), tl.full((RANKS,), -float("inf"), tl.float32)
    for i in range(TOP_K):
        best = tl.min(tl.where(keys == tl.max(keys, axis=0), expert, WIDTH), axis=0)
        score = tl.sum(tl.where(expert == best, scores, 0.0), axis=0)
        if KIND == "sparsemixer":
            score = _sparse_share(x, keys, score, margin)
        chosen, values = tl.where(rank == i, best, chosen), tl.where(rank == i, score, values)
        keys = tl.where(expert == best, -float("inf"), keys)
    if KIND == "topk_softmax":
        values = tl.exp(values - tl.max(values, axis=0))
        values = values / tl.sum(values, axis=0)
    elif RENORMALISE and KIND != "sparsemixer":
        values = values / tl.sum(tl.where(rank < TOP_K, values, 0.0), axis=0)
    chosen, values = tl.where(damaged, rank, chosen), tl.where(damaged, float("nan"), values * scale)
    tl.store(ids + row * TOP_K + rank, chosen, mask=rank < TOP_K)
    tl.store(weights + row * TOP_K + rank, values, mask=rank < TOP_K)


@triton.jit
def _is_damaged(x, there):
    """Whether any of those that are there is NaN or infinite, by their bits: none of them is the largest then."""
    sizes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.where(there, sizes, 0), axis=0) >= 0x7F800000


@triton.jit
def _sparse_share(x, left, top, margin):
    """The share of the logit `top`, the largest of those left, among those of them that are close to it."""
    far = (top - x) / tl.maximum(tl.abs(x), top) > margin
    return 1.0 / tl.sum(tl.where(far, 0.0, tl.exp(left - top)), axis=0)


@triton.jit
def _within_groups(keys, expert, SIZE: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TWO: tl.constexpr):
    """Keys of experts outside the best groups become -inf. A group is worth its largest key, or its two largest."""
    worth = tl.full(keys.shape, -float("inf"), tl.float32)
    for group in range(GROUPS):
        own = tl.where(expert // SIZE == group, keys, -float("inf"))
        value = tl.max(own, axis=0)
        if TWO:
            first = tl.min(tl.where(own == value, expert, keys.shape[0]), axis=0)
            value += tl.max(tl.where(expert == first, -float("inf"), own), axis=0)
        worth = tl.where(expert // SIZE == group, value, worth)
    kept = tl.zeros(keys.shape, tl.int32)
    left = worth
    for _ in range(TOP_GROUPS):
        best = tl.min(tl.where(left == tl.max(left, axis=0), expert, keys.shape[0]), axis=0) // SIZE
        kept = tl.where(expert // SIZE == best, 1, kept)
        left = tl.where(expert // SIZE == best, -float("inf"), left)
    return tl.where(kept > 0, keys, -float("inf"))
