"""Calls that teach: rules of prefetch learn from them before others are replayed, and no cache sees them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.outside import place_of
from gpu_cache.prefetch import Prefetch, can_be_taught
from gpu_cache.trace import Calls


def taught_by(calls: Calls, teacher: Calls) -> Calls:
    """The same calls, taught by those of another trace. Raises CacheError for one of another model."""
    if (teacher.layers, teacher.experts) != (calls.layers, calls.experts):
        raise CacheError(
            f"rules cannot learn from {teacher.layers} layers of {teacher.experts} experts what to name of "
            f"{calls.layers} of {calls.experts}; give traces of one model"
        )
    return replace(calls, teacher=teacher)


def taught_by_first(calls: Calls, share: float) -> Calls:
    """The calls behind the first `share` of the steps, taught by those before. Raises CacheError if either are none."""
    begins = np.flatnonzero(np.diff(calls.step, prepend=-1))  # the first group of every step
    first = int(share * len(begins)) if 0 < share < 1 else 0
    if not 0 < first < len(begins):
        raise CacheError(
            f"the first {share:g} of {len(begins)} steps cannot teach what the others need; give a share above 0 and "
            "below 1 that leaves at least one step on either side"
        )
    at = int(begins[first])
    return taught_by(part_of(calls, at, len(calls)), part_of(calls, 0, at))


def part_of(calls: Calls, first: int, last: int) -> Calls:
    """Groups [first, last)."""
    begin, end = int(calls.start[first]), int(calls.start[last])
    return replace(
        calls,
        step=calls.step[first:last],
        sequence=calls.sequence[first:last],
        layer=calls.layer[first:last],
        start=calls.start[first : last + 1] - begin,
        expert=calls.expert[begin:end],
        score=calls.score[begin:end],
        named=calls.named and part_of(calls.named, first, last),
    )


def check_taught(rule: Prefetch) -> None:
    """Raise CacheError for a rule that cannot learn without choosing."""
    if not can_be_taught(rule):
        raise CacheError(
            f"{place_of(type(rule).follow)}: {type(rule).__name__} learns and chooses in follow; give it learn and "
            "choose instead, so that it can be taught before a replay"
        )


def teach(rule: Prefetch, teacher: Calls) -> None:
    for _, layer, experts, _ in teacher:
        rule.learn(layer, experts)
