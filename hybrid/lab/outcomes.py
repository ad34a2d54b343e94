"""What a cache does with all traces of a model, whatever the seed: rates with intervals, regret, copies, speeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_cache.costs import Machine, Work, cpu_only, predict
from gpu_cache.intervals import interval
from gpu_cache.prefetch import PERFECT, Prefetch, rule_and_depth
from gpu_cache.simulator import SCHEDULES
from gpu_cache.sweep import work_of_row
from hybrid.lab.experiment import Experiment
from hybrid.lab.grid import BOUND
from hybrid.lab.replays import Replay, Row, kept_replays, read_sources

Reals = NDArray[np.float64]
Range = tuple[float, float]


class Place(NamedTuple):
    """The caches among which policies are compared. quota: copies a step; delay: lookups that a copy takes."""

    nblocks: int
    nways: int
    mapping: str
    quota: int | None
    delay: int

    @property
    def slots(self) -> int:
        return self.nblocks * self.nways

    def __str__(self) -> str:
        extra = [self.mapping] * (self.mapping != "modulo") + [f"{self.quota} copies a step"] * (self.quota is not None)
        extra += [f"delay {self.delay}"] * (self.delay > 0)
        return ", ".join([f"{self.nblocks} x {self.nways}", *extra])


@dataclass(frozen=True)
class Outcome:
    """One policy and admission rule in one cache. rows: of every trace and seed; seeds: how many.

    machine: that admission reckoned with; bound: hits that nothing exceeds, None where that is not
    known.
    """

    model: str
    place: Place
    policy: str
    admission: str
    prefetch: str
    machine: str | None
    rows: tuple[Row, ...]
    seeds: int
    bound: int | None = None

    @property
    def name(self) -> str:
        words = [self.policy, *([self.admission] if self.admission != "always" else [])]
        words += [f"{self.prefetch} prefetch"] if self.prefetch != Prefetch.name else []
        return ", ".join([*words, *([f"for {self.machine}"] if self.machine else [])])

    @property
    def causal(self) -> bool:
        """Whether it does not know the future."""
        return self.policy not in SCHEDULES and rule_and_depth(self.prefetch)[0] != PERFECT

    def mean(self, what: str) -> float:
        """A count, such as "calls", of all traces."""
        return float(sum(row[what] for row in self.rows)) / self.seeds

    @property
    def hit_rate(self) -> float:
        return self.mean("hits") / self.mean("calls")

    @property
    def hit_interval(self) -> Range | None:
        """Of 95 %, from the blocks of all traces."""
        hits, calls = self._blocks()
        return interval(hits, calls)

    @property
    def regret(self) -> float | None:
        """The share of calls that the bound hits and this does not."""
        return None if self.bound is None else self.bound / self.mean("calls") - self.hit_rate

    @property
    def copies_per_step(self) -> float:
        return self.mean("fills") / self.mean("steps")

    def points_beside(self, other: Outcome) -> tuple[float, Range | None]:
        """By how many points its hit rate is higher, with the interval of 95 %, in points."""
        hits, calls = self._blocks()
        ends = interval(hits - other._blocks()[0], calls)
        apart = 100 * (self.hit_rate - other.hit_rate)
        return apart, None if ends is None else (100 * ends[0], 100 * ends[1])

    def tokens_per_second(self, machine: Machine) -> float:
        return predict(self._work(), machine).tokens_per_second

    def cpu_tokens_per_second(self, machine: Machine) -> float:
        """The same calls with every expert on the CPU."""
        return cpu_only(self._work(), machine).tokens_per_second

    def _work(self) -> Work:
        parts = [work_of_row(row) for row in self.rows]
        splits = np.concatenate([part.splits for part in parts])
        return Work(sum(part.steps for part in parts), sum(part.fills for part in parts), splits)

    def _blocks(self) -> tuple[Reals, Reals]:
        """Hits and calls of the blocks of all traces, those of several seeds as their mean."""
        by_trace: dict[str, list[Row]] = {}
        for row in self.rows:
            by_trace.setdefault(row["trace"], []).append(row)
        hits, calls = (
            np.concatenate([np.mean([row[what] for row in rows], axis=0) for rows in by_trace.values()])
            for what in ("block_hits", "block_calls")
        )
        return hits, calls


def outcomes_of(replays: Iterable[Replay]) -> list[Outcome]:
    """One for each policy in each cache of each model, in the order in which they first come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for replay in replays:
        row = replay.row
        place = Place(row["nblocks"], row["nways"], row["mapping"], row["quota"], row["delay"])
        key = (replay.model, place, row["policy"], row["admission"], row["prefetch"], replay.machine)
        found.setdefault(key, []).append({**row, "trace": replay.trace})
    bounds = {key[:2]: _bound(rows) for key, rows in found.items() if key[2] == BOUND}
    made = []
    for (model, place, policy, admission, prefetch, machine), rows in found.items():
        seeds = len({row["seed"] for row in rows})
        bound = bounds.get((model, place))
        if prefetch != Prefetch.name:
            bound = _bound([row for row in rows if row["seed"] == rows[0]["seed"]])
        made.append(Outcome(model, place, policy, admission, prefetch, machine, tuple(rows), seeds, bound))
    return made


def _bound(rows: Sequence[Row]) -> int | None:
    bounds = [row["upper_bound"] for row in rows]
    return None if None in bounds else sum(bounds)


def records(experiment: Experiment, outcomes: Iterable[Outcome]) -> list[Row]:
    """Outcomes as rows of a table: plain values by the name of a column, the same columns in every row."""
    expert_mb = {model.name: model.expert_mb for model in experiment.models}
    machines = {model.name: experiment.machines_of(model) for model in experiment.models}
    return [_record(one, expert_mb[one.model], machines[one.model], experiment) for one in outcomes]


def _record(one: Outcome, expert_mb: float | None, machines: dict[str, Machine], experiment: Experiment) -> Row:
    low, high = one.hit_interval or (None, None)
    row: Row = {"model": one.model, **one.place._asdict(), "slots": one.place.slots}
    row |= {"policy": one.policy, "admission": one.admission, "prefetch": one.prefetch}
    row |= {"machine": one.machine, "seeds": one.seeds}
    row |= {what: round(one.mean(what)) for what in ("steps", "calls", "hits", "fills", "evictions")}
    row |= {"hit_rate": round(one.hit_rate, 6), "hit_rate_low": low, "hit_rate_high": high}
    row["regret"] = None if one.regret is None else round(one.regret, 6)
    row["copied_mb_per_step"] = None if expert_mb is None else round(one.copies_per_step * expert_mb, 4)
    for machine in experiment.machines:
        rates = machines.get(machine.name) if one.machine in (None, machine.name) else None
        row[f"tokens_per_second, {machine.name}"] = None if rates is None else round(one.tokens_per_second(rates), 3)
        row[f"cpu_tokens_per_second, {machine.name}"] = (
            None if rates is None else round(one.cpu_tokens_per_second(rates), 3)
        )
    return row


def outcomes(experiment: Experiment, folder: Path | None = None) -> list[Outcome]:
    """What a run has kept in a folder; None: the experiment's. Raises ConfigError if replays are missing."""
    return outcomes_of(kept_replays(experiment, read_sources(experiment), folder))


def table(experiment: Experiment, folder: Path | None = None) -> list[Row]:
    """The same as rows of plain values, as the report's CSV has them."""
    return records(experiment, outcomes(experiment, folder))
