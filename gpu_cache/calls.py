"""The calls of a layer: the distinct experts that its rows chose."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_calls(ids: Sequence[int], scores: Sequence[float], top_k: int) -> tuple[Sequence[int], Sequence[float]]:
    """Experts in the order of their first appearance, and the largest score of each.

    ids, scores: [rows * top_k], rows in order, ranks in order within a row; the experts of a row differ.
    """
    if len(ids) == top_k:
        return ids, scores
    largest: dict[int, float] = {}
    for expert, score in zip(ids, scores, strict=True):
        if expert not in largest or score > largest[expert]:
            largest[expert] = score
    return list(largest), list(largest.values())
