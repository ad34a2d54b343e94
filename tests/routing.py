"""Small made-up traces for tests of the cache."""

from __future__ import annotations

import numpy as np

from gpu_cache.trace import Trace, make_trace


def random_trace(
    seed: int, steps: int = 40, layers: int = 3, experts: int = 8, top_k: int = 2, tokens: int = 1, sticky: float = 0.5
) -> Trace:
    """Every token keeps each of its last experts with probability `sticky` and draws the others evenly."""
    random = np.random.default_rng(seed)
    chosen = random.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]
    rows = []
    for step in range(steps):
        for layer in range(layers):
            for token in range(tokens):
                chosen[token, layer] = _next(random, chosen[token, layer], experts, sticky)
                scores = np.sort(random.dirichlet(np.ones(top_k)))[::-1].astype(np.float32)
                picks = zip(chosen[token, layer].tolist(), scores, strict=True)
                rows += [(step, token, step, layer, rank, expert, score) for rank, (expert, score) in enumerate(picks)]
    names = ("step", "sequence", "position", "layer", "rank", "expert", "score")
    return make_trace(dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True)), layers, experts)


def _next(random: np.random.Generator, last: np.ndarray, experts: int, sticky: float) -> np.ndarray:
    kept = last[random.random(len(last)) < sticky]
    others = np.setdiff1d(np.arange(experts), kept)
    drawn = random.permutation(others)[: len(last) - len(kept)]
    return random.permutation(np.concatenate([kept, drawn]))
