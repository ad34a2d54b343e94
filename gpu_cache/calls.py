"""The calls of a layer: every distinct expert that its rows ask for, once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def distinct_calls(ids: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> tuple[list[int], list[float]]:
    """Experts in the order of their first appearance, rows in order and ranks in order within a row, and the largest
    score of each. ids, scores: [rows, top_k].
    """
    if len(ids) == 1:
        return ids[0].tolist(), scores[0].tolist()
    largest: dict[int, float] = {}
    for expert, score in zip(ids.reshape(-1).tolist(), scores.reshape(-1).tolist(), strict=True):
        if expert not in largest or score > largest[expert]:
            largest[expert] = score
    return list(largest), list(largest.values())
