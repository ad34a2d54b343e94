"""Whether a cache pays at all: predicted speed beside the CPU alone and beside experts that never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_cache.costs import Machine
from hybrid.lab.outcomes import Outcome

MARGIN = 1.05  # predictions that are closer than this are not told apart
FIXED = ("static-best", "static-layers")


@dataclass(frozen=True)
class Verdict:
    """Of one model on one machine with so many slots; tokens a second. fixed: of the best experts that never move,
    chosen in hindsight.
    """

    model: str
    machine: str
    slots: int
    cpu: float
    fixed: float
    cache: float
    best: str

    @property
    def pays(self) -> bool:
        return self.cache >= MARGIN * max(self.cpu, self.fixed)

    @property
    def text(self) -> str:
        if self.pays:
            return "a cache pays"
        if max(self.fixed, self.cache) < MARGIN * self.cpu:
            return "neither pays: the CPU alone is as fast"
        near = self.cache * MARGIN > self.fixed
        return f"fixed experts do {'as well as' if near else 'better than'} a cache"


def verdicts(outcomes: Sequence[Outcome], machines: dict[str, Machine]) -> list[Verdict]:
    """For each number of slots of each machine. outcomes: of one model."""
    found = []
    for name, machine in machines.items():
        for slots in sorted({one.place.slots for one in outcomes}):
            members = [one for one in outcomes if one.place.slots == slots and one.machine in (None, name)]
            found += _judge(members, name, machine, slots)
    return found


def _judge(members: Sequence[Outcome], name: str, machine: Machine, slots: int) -> list[Verdict]:
    """None where there is no policy, or nothing fixed, to compare."""
    speeds = [(one.tokens_per_second(machine), one) for one in members]
    caches = [pair for pair in speeds if pair[1].causal]
    fixed = [speed for speed, one in speeds if one.policy in FIXED]
    if not caches or not fixed:
        return []
    speed, best = max(caches, key=lambda pair: pair[0])
    cpu = best.cpu_tokens_per_second(machine)
    return [Verdict(best.model, name, slots, cpu, max(fixed), speed, f"{best.name}, {best.place}")]
