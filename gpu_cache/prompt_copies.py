"""Replays calls where every copy ends before the next lookup, which most replays assume and which is fast to count."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gpu_cache.admission import Admission, Costs, make_admission
from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.hooks import overridden
from gpu_cache.policies import make_policy
from gpu_cache.policies.base import Policy
from gpu_cache.table import ABSENT, EMPTY, Counts
from gpu_cache.trace import Calls, Ints


class _Events(NamedTuple):
    """fills, evictions: by layer. found: hits of every group."""

    fills: list[int]
    evictions: list[int]
    found: list[int]


def replay_prompt_copies(
    calls: Calls,
    geometry: Geometry,
    policy: str = "LRU",
    admission: str = "always",
    quota: int | None = None,
    seed: int = 0,
    costs: Costs | None = None,
) -> tuple[Counts, Ints]:
    """What a `Table` with these settings counts when a `CopyClock(0)` times its copies, and the hits of every group.

    No expert is loading at a lookup then, so that a slot is free, or ready and blocked at most during one group: the
    table's loading state and the clock are left out. Raises CacheError for what no table can have.
    """
    if quota is not None and quota < 0:
        raise CacheError(f"quota of copies in a step: {quota}, must be 0 or more, or none for no limit")
    rule, admits = make_policy(policy, geometry, seed), make_admission(admission, geometry, costs)
    events = _count(calls, geometry, rule, admits, quota)
    found, fills, evictions = (np.array(count, np.int64) for count in (events.found, events.fills, events.evictions))
    hits, total = calls.by_layer(found), calls.by_layer(calls.sizes)
    return Counts(total, hits, np.zeros_like(hits), total - hits, fills, evictions), found


def _count(calls: Calls, geometry: Geometry, policy: Policy, admission: Admission, quota: int | None) -> _Events:
    """Everything is a local name and nothing is called that does nothing: this loop is the time of a sweep."""
    events = _Events([0] * geometry.layers, [0] * geometry.layers, [])
    fills, evictions, count = events.fills, events.evictions, events.found.append
    index_of, nways = geometry.indexes().tolist(), geometry.nways
    slot_of = [ABSENT] * len(index_of)
    key_of = [EMPTY] * geometry.slots
    free = [list(range(first + nways - 1, first - 1, -1)) for first in range(0, geometry.slots, nways)]
    on_lookup, on_fill = overridden(policy.on_lookup, Policy.on_lookup), overridden(policy.on_fill, Policy.on_fill)
    wants, on_call = overridden(admission.wants, Admission.wants), overridden(admission.on_call, Admission.on_call)
    on_admitted, replace = overridden(admission.on_fill, Admission.on_fill), policy.replace
    current, full = None, len(index_of) if quota is None else quota
    left = full
    for steps, layers, ends, all_keys, experts, scores in calls.in_lists():
        begin = 0
        for step, layer, end in zip(steps, layers, ends, strict=True):
            if step != current:
                current, left = step, full
                policy.on_step(step)
                admission.on_step()
            keys, slots, missed = all_keys[begin:end], [], []
            for key in keys:
                slot = slot_of[key]
                if slot < 0:
                    missed.append(key)
                else:
                    slots.append(slot)
            if on_call is not None:
                on_call(keys)
            if on_lookup is not None:
                on_lookup(layer, experts[begin:end], scores[begin:end], slots)
            begin = end
            count(len(slots))
            if not missed:
                continue
            blocked, copied, replaced = {*slots}, 0, 0
            for key in missed:
                index = index_of[key]
                if index < 0 or (wants is not None and not wants(index, key)) or copied == left:
                    continue
                if free[index]:
                    slot = free[index].pop()
                    if on_fill is not None:
                        on_fill(slot, key)
                else:
                    chosen = replace(index, key, blocked)
                    if chosen is None:
                        continue
                    slot = chosen
                    slot_of[key_of[slot]] = ABSENT
                    replaced += 1
                if on_admitted is not None:
                    on_admitted(index)
                key_of[slot], slot_of[key] = key, slot
                blocked.add(slot)
                copied += 1
            left -= copied
            fills[layer] += copied
            evictions[layer] += replaced
    return events
