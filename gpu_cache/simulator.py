"""Replays a trace through the table and policies that the engine uses, and through those that know the future."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from gpu_cache import bounds
from gpu_cache.admission import Costs
from gpu_cache.bounds import Schedule
from gpu_cache.clock import CopyClock
from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.policies import POLICIES, known_policy
from gpu_cache.prefetch import (
    NEXT_GATE,
    PERFECT,
    NextGate,
    Perfect,
    Prefetch,
    depth_of,
    known_prefetch,
    learnt_rule,
    rule_and_depth,
)
from gpu_cache.prompt_copies import replay_prompt_copies
from gpu_cache.quota_bound import prefetch_bound, quota_bound
from gpu_cache.table import Fill, Table
from gpu_cache.teaching import check_taught, teach
from gpu_cache.trace import Calls, Ints

SCHEDULES: Mapping[str, Callable[[Calls, Geometry, int | None], Schedule]] = {
    "Belady": bounds.belady,
    "bypass-Belady": bounds.bypass_belady,
    "static-best": lambda calls, geometry, quota: bounds.static_best(calls, geometry),
    "static-layers": lambda calls, geometry, quota: bounds.static_layers(calls, geometry),
}


@dataclass(frozen=True)
class Setting:
    """What is replayed. quota: copies a step, None: no limit. delay: lookups that a copy takes beyond the next one.
    prefetch: a name as `gpu_cache.prefetch.known_prefetch` takes it; schedules have none.
    """

    nblocks: int
    nways: int
    policy: str = "LRU"
    admission: str = "always"
    mapping: str = "modulo"
    quota: int | None = None
    delay: int = 0
    seed: int = 0
    prefetch: str = "none"

    def geometry(self, calls: Calls) -> Geometry:
        return Geometry(self.nblocks, self.nways, calls.layers, calls.experts, self.mapping)

    def check(self, calls: Calls, costs: Costs | None = None) -> None:
        """Raise CacheError for what no cache can have."""
        if self.delay < 0:
            raise CacheError(f"delay of copies: {self.delay}, must be 0 lookups or more")
        policy = known_policy(self.policy, policy_names())
        prefetch = known_prefetch(self.prefetch)
        if prefetch != Prefetch.name and policy in SCHEDULES:
            raise CacheError(f"{policy} copies on a miss only; replay it with prefetch none")
        if prefetch == NEXT_GATE:
            _named(calls)
        policy = next(iter(POLICIES)) if policy in SCHEDULES else policy
        Table(self.geometry(calls), policy, self.admission, self.quota, self.seed, costs)
        rule = learnt_rule(prefetch, self.geometry(calls))
        if rule is not None and calls.teacher is not None:
            check_taught(rule)


@dataclass(frozen=True)
class Result:
    """hits, loading, misses, fills, evictions, calls: int64 [layers]. calls = hits + loading + misses.

    groups: int64 [groups], the calls of every group; found: its hits. upper_bound: hits that nothing exceeds, where
    this is a bound. prefetched: copies that were made before a call; used: those that were hit before they left.
    """

    setting: Setting
    steps: int
    calls: Ints
    hits: Ints
    loading: Ints
    misses: Ints
    fills: Ints
    evictions: Ints
    groups: Ints
    found: Ints
    upper_bound: int | None = None
    prefetched: int = 0
    used: int = 0

    @property
    def hit_rate(self) -> float:
        return float(self.hits.sum() / self.calls.sum())


def replay(calls: Calls, setting: Setting, costs: Costs | None = None) -> Result:
    """Count what a cache of this setting does with the calls. costs: as `Table` takes them, for break-even admission.

    Raises CacheError for a setting that no cache can have.
    """
    name = known_policy(setting.policy, policy_names())
    return _replay_schedule(calls, setting, name) if name in SCHEDULES else _replay_table(calls, setting, costs)


def policy_names() -> tuple[str, ...]:
    """Every policy that can be replayed, those that know the future last."""
    return (*POLICIES, *SCHEDULES)


def _replay_table(calls: Calls, setting: Setting, costs: Costs | None) -> Result:
    how = (setting.geometry(calls), setting.policy, setting.admission, setting.quota, setting.seed, costs)
    ahead = _make_prefetch(known_prefetch(setting.prefetch), calls, how[0])
    if setting.delay == 0 and ahead is None:
        counts, found = replay_prompt_copies(calls, *how)
    else:
        table = Table(*how)
        found = np.array(drive(calls, table, CopyClock(setting.delay), ahead))
        counts = table.counts
    if ahead is None:
        return Result(setting=setting, steps=calls.steps, groups=calls.sizes, found=found, **counts._asdict())
    return Result(
        setting=setting,
        steps=calls.steps,
        groups=calls.sizes,
        found=found,
        upper_bound=prefetch_bound(calls, how[0], setting.quota),
        prefetched=ahead.copied,
        used=ahead.used,
        **counts._asdict(),
    )


class Ahead:
    """Copies ahead of calls, and what becomes of them. copied: their number; used: those that were hit.

    learns: whether the rule goes on learning.
    """

    def __init__(self, rule: Prefetch, learns: bool = True) -> None:
        self.copied = self.used = 0
        self._rule = rule
        self._choose = rule.follow if learns else rule.choose
        self._waiting: set[int] = set()  # keys that were copied ahead and not called since

    def copy(self, table: Table, layer: int, experts: Sequence[int], hits: Sequence[tuple[int, int]]) -> list[Fill]:
        """The copies that a rule wants after a lookup and its admission."""
        base = layer * self._rule.experts
        used = self._waiting.intersection([base + expert for expert, _ in hits])
        self._waiting -= used
        self.used += len(used)
        named = self._choose(layer, experts)
        fills = table.prefetch(self._rule.ahead(layer), named)
        self._waiting.update(fill.key for fill in fills)
        self.copied += len(fills)
        return fills

    def forget(self, fills: Iterable[Fill]) -> None:
        """What these copies evict was copied ahead in vain, if it still waits."""
        self._waiting.difference_update(fill.evicted for fill in fills if fill.evicted is not None)


def _make_prefetch(name: str, calls: Calls, geometry: Geometry) -> Ahead | None:
    rule: Prefetch | None
    if rule_and_depth(name)[0] == PERFECT:
        rule = Perfect(geometry, iter(calls), depth_of(name))
    elif name == NEXT_GATE:
        rule = NextGate(geometry, iter(_named(calls)))
    else:
        rule = learnt_rule(name, geometry)
        if rule is not None and calls.teacher is not None:
            teach(rule, calls.teacher)
            return Ahead(rule, learns=False)
    return None if rule is None else Ahead(rule)


def _named(calls: Calls) -> Calls:
    if calls.named is None or calls.named_share == 0:
        raise CacheError(
            f"prefetch {NEXT_GATE} cannot be replayed: this trace does not hold what routers say one layer early; "
            f"record one with --cache-prefetch {NEXT_GATE} --trace FILE"
        )
    return calls.named


def drive(calls: Calls, table: Table, clock: CopyClock, ahead: Ahead | None = None) -> list[int]:
    """Send the calls through a table, copies timed by the clock; returns the hits of every group."""
    found: list[int] = []
    current = None
    lookup, admit, release, publish = table.lookup, table.admit, table.release, table.publish
    due, issue, slot_of = clock.due, clock.issue, itemgetter(0)
    for step, layer, experts, scores in calls:
        if step != current:
            table.begin_step(step)
            current = step
        ended = due()
        if ended:
            publish(*ended)
        hits = lookup(layer, experts, scores)[0]
        found.append(len(hits))
        fills = admit() if len(hits) < len(experts) else []
        if ahead is not None:
            ahead.forget(fills)
            early = ahead.copy(table, layer, experts, hits)
            ahead.forget(early)
            fills += early
        if fills:
            issue(*map(slot_of, fills))
        if hits:
            release()
    return found


def _replay_schedule(calls: Calls, setting: Setting, name: str) -> Result:
    geometry = setting.geometry(calls)
    schedule = SCHEDULES[name](calls, geometry, setting.quota)
    total = calls.by_layer(calls.sizes)
    bound = int(schedule.hits.sum()) if _is_bound(calls, setting, name) else None
    if name == "bypass-Belady" and bound is None:
        bound = quota_bound(calls, geometry, setting.quota or 0)
    return Result(
        setting=setting,
        steps=calls.steps,
        calls=total,
        hits=schedule.hits,
        loading=np.zeros_like(total),
        misses=total - schedule.hits,
        fills=schedule.fills,
        evictions=schedule.evictions,
        groups=calls.sizes,
        found=schedule.found,
        upper_bound=bound,
    )


def _is_bound(calls: Calls, setting: Setting, name: str) -> bool:
    """bypass-Belady bounds everything; Belady what admits every miss and always has room, at once."""
    if name == "bypass-Belady":
        return setting.quota is None
    return name == "Belady" and setting.quota is None and setting.delay == 0 and calls.largest <= setting.nways
