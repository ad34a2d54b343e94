"""Minus recent score: the average of the gate's scores, recent ones first."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.policies.decayed import DecayedPolicy

ALPHA = 0.5


class Mrs(DecayedPolicy):
    """Zhong et al., HybriMoE, DAC 2025: S = ALPHA * score + (1 - ALPHA) * S at each lookup of a layer; the least goes.

    Here the score of an expert that is not called counts as 0; HybriMoE also counts some scores just below the top-k.
    Where scores are unknown, all that are called share 1.
    """

    name = "MRS"
    decay = 1 - ALPHA
    by_layer = True

    def on_call(self, layer: int, keys: Sequence[int], scores: Sequence[float] | None) -> None:
        worth, value = ALPHA * self.age(layer), self._value
        for key, score in zip(keys, scores or [1 / len(keys)] * len(keys), strict=False):
            value[key] += worth * score
