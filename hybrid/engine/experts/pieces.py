"""The bytes of experts in host memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gpu_cache.device import Bytes
from hybrid.machine.memory import view
from hybrid.plan.expert_cache import CachePlan


def pieces_of(pieces: list[list[Bytes]], experts: int, key: int) -> list[Bytes]:
    """Pieces of the expert `key`. pieces: from `expert_pieces`. experts: number per layer."""
    layer, expert = divmod(key, experts)
    return [piece[expert] for piece in pieces[layer]]


def whole_memory(pieces: list[list[Bytes]]) -> list[Bytes]:
    """All memory that contains the pieces."""
    return [piece.reshape(-1) for layer in pieces for piece in layer]


def expert_pieces(plan: CachePlan, weights: Callable[[str], int]) -> list[list[Bytes]]:
    """The pieces of the experts of every MoE layer, each [experts, bytes], in the memory of the host."""
    experts = plan.shape.experts
    return [
        [view(weights(f"layers.{layer}.ffn.{name}"), (experts, size), np.uint8) for name, size in plan.shape.pieces]
        for layer in plan.shape.layers
    ]
