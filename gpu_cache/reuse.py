"""How often tokens choose the experts that the tokens, or the layers, before them chose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.trace import Trace

MAX_TOKENS = 20_000  # the first ones of a longer trace

Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Reuse:
    """Shares, 0 to 1, of the experts that a token chooses at a layer: how many were chosen before.

    tokens: [distances, layers], chosen too by the token `1 + row` before it in its sequence. window: [distances,
    layers], by any of the last `1 + row`. layers: [layers - 1], whose number the layer before chose too. same_sets:
    [layers], tokens whose experts are exactly those of the token before; one_of_token: [layers], that have at least one
    of them; same_sets_across, one_across: [layers - 1], the same of the numbers of the layer before. chance: if experts
    were drawn evenly; chance_of_one, chance_of_all: of at least one, and of exactly the same.
    """

    tokens: Reals
    window: Reals
    layers: Reals
    same_sets: Reals
    one_of_token: Reals
    same_sets_across: Reals
    one_across: Reals
    chance: float
    chance_of_one: float
    chance_of_all: float


def measure_reuse(trace: Trace, distances: int = 8) -> Reuse:
    """Compare every token with those before it. Raises CacheError for a trace without two tokens in a sequence."""
    chosen, sequence = _membership(trace)
    top_k = chosen.sum(axis=2)
    tokens, window = [], []
    earlier = np.zeros_like(chosen)
    for distance in range(1, distances + 1):
        if not (sequence[distance:] == sequence[:-distance]).any():
            break
        same = np.zeros(len(chosen), bool)
        same[distance:] = sequence[distance:] == sequence[:-distance]
        shifted = np.zeros_like(chosen)
        shifted[distance:] = chosen[:-distance] & same[distance:, None, None]
        earlier |= shifted
        tokens.append(_share(chosen & shifted, top_k, same))
        window.append(_share(chosen & earlier, top_k, same))
    if not tokens:
        raise CacheError("no sequence of the trace has two tokens with all their layers; record a longer one")
    follows = np.flatnonzero(sequence[1:] == sequence[:-1])
    here, before = chosen[follows + 1], chosen[follows]
    upper, lower = chosen[:, 1:], chosen[:, :-1]
    common = upper & lower
    usual = round(float(top_k.mean()))
    ways = math.comb(trace.experts, usual)
    return Reuse(
        np.array(tokens),
        np.array(window),
        common.sum(axis=(0, 2)) / np.maximum(top_k[:, 1:].sum(axis=0), 1),
        (here == before).all(axis=2).mean(axis=0),
        (here & before).any(axis=2).mean(axis=0),
        (upper == lower).all(axis=2).mean(axis=0),
        common.any(axis=2).mean(axis=0),
        float(top_k.mean()) / trace.experts,
        1 - math.comb(trace.experts - usual, usual) / ways,
        1 / ways,
    )


def _membership(trace: Trace) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """[tokens, layers, experts], whether a token chose an expert, and the sequence of each token, in their order."""
    token = np.stack([trace.sequence, trace.position])
    names, number = np.unique(token, axis=1, return_inverse=True)
    kept = number < MAX_TOKENS
    tokens = min(names.shape[1], MAX_TOKENS)
    chosen = np.zeros((tokens, trace.layers, trace.experts), bool)
    chosen[number[kept], trace.layer[kept], trace.expert[kept]] = True
    whole = np.all(chosen.any(axis=2), axis=1)
    return chosen[whole], names[0, :tokens][whole]


def _share(common: NDArray[np.bool_], top_k: NDArray[np.int64], rows: NDArray[np.bool_]) -> Reals:
    share: Reals = common[rows].sum(axis=(0, 2)) / top_k[rows].sum(axis=0)
    return share
