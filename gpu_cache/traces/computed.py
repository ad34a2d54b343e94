"""Traces of what a program computed, layer after layer, without a word of tokens and steps: llama.cpp's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.trace import Ints, Trace
from gpu_cache.traces.base import Sizes, finish, passes_of, routed


def trace_of_passes(
    layer: Ints, experts: Ints, sizes: Sizes, name: str, begins_sequence: NDArray[np.bool_] | None = None
) -> Trace:
    """A trace of rows of one token at one layer, in the order in which they were computed.

    layer: [rows]. experts: [rows, k], best first. begins_sequence: [rows], where another one begins; None: nowhere.
    Every pass is a step. Where a layer has fewer tokens than others (llama.cpp computes the last layer of a prompt for
    its last token alone), they are the last ones. Raises CacheError for no rows.
    """
    rows, top_k = experts.shape
    if not rows:
        raise CacheError(f"{name}: holds no rows; record at least one token")
    begins = np.zeros(rows, bool) if begins_sequence is None else begins_sequence
    sequence = np.cumsum(begins)
    sequence -= sequence[0]
    step = passes_of(layer, sequence)
    group = np.cumsum((np.diff(step, prepend=-1) != 0) | (np.diff(layer, prepend=-1) != 0)) - 1
    start = np.flatnonzero(np.diff(group, prepend=-1))
    count = np.bincount(group)
    tokens = np.zeros(int(step[-1]) + 1, np.int64)
    np.maximum.at(tokens, step[start], count)
    position = np.arange(rows) - start[group] + (tokens[step] - count[group]) + _before(tokens, sequence, step)[step]
    columns = {"step": step, "sequence": sequence, "position": position, "layer": layer}
    columns = {key: np.repeat(column, top_k) for key, column in columns.items()}
    columns["rank"] = np.tile(np.arange(top_k), rows)
    columns |= {"expert": experts.reshape(-1), "score": np.full(experts.size, 1 / top_k, np.float32)}
    return finish(routed(columns), sizes, name)


def _before(tokens: Ints, sequence: Ints, step: Ints) -> Ints:
    """[passes]: tokens of a pass's sequence before it. tokens: [passes]."""
    begins = np.flatnonzero(np.diff(step, prepend=-1))
    of_pass = sequence[begins]
    before = np.cumsum(tokens) - tokens
    first = np.flatnonzero(np.diff(of_pass, prepend=-1))
    return np.asarray(before - before[first][of_pass], np.int64)
