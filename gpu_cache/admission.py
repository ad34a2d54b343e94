"""Admission: which misses are worth a copy. The table calls these rules for every miss, call and fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.hooks import overridden
from gpu_cache.outside import (
    check_answers,
    class_of_entry,
    class_of_file,
    entry_names,
    guard,
    is_file,
    make_outside,
)

WINDOW = 64  # steps in which a second miss must follow the first
HALF_LIFE = 64  # steps after which a call counts half
_RESCALE_AT = 2.0**512


@dataclass(frozen=True)
class Costs:
    """Seconds for one expert: to copy it to the device, to compute it on the CPU, to compute it on the device."""

    copy: float
    cpu: float
    device: float


class Admission:
    """Interface of an admission rule. This one admits every miss."""

    name = "always"

    def __init__(self, geometry: Geometry, costs: Costs | None = None) -> None:
        del geometry, costs

    def on_step(self) -> None:
        """A step begins."""

    def on_call(self, keys: Sequence[int]) -> None:
        """A layer calls these experts."""

    def on_fill(self, index: int) -> None:
        """An expert is being copied into a slot of an index."""

    def wants(self, index: int, key: int) -> bool:
        """Whether to copy a missed expert into its index. Called once for each miss, after `on_call`."""
        return True


class SecondTouch(Admission):
    """Admits an expert that missed before, at most `WINDOW` steps ago.

    The rule of content delivery networks (Maggs and Sitaraman, Algorithmic nuggets in content delivery, 2015), with an
    exact memory in place of a Bloom filter.
    """

    name = "second-touch"

    def __init__(self, geometry: Geometry, costs: Costs | None = None) -> None:
        self._now = 0
        self._missed = [-WINDOW - 1] * (geometry.layers * geometry.experts)  # step of the last miss of each key

    def on_step(self) -> None:
        self._now += 1

    def wants(self, index: int, key: int) -> bool:
        last, self._missed[key] = self._missed[key], self._now
        return self._now - last <= WINDOW


class BreakEven(Admission):
    """Admits an expert if it should save more time on the device than its copy takes; `docs/cache.md` derives the rule.

    Calls and fills are counted with a weight that halves in `HALF_LIFE` steps. With f calls of an expert, this one
    included, and F fills of an index of M ways, its expected calls while it is there are (f - 1) * min(1, M / F).
    """

    name = "break-even"

    def __init__(self, geometry: Geometry, costs: Costs | None = None) -> None:
        if costs is None:
            raise CacheError(
                "break-even admission needs costs: seconds to copy an expert, and to compute it on CPU and device"
            )
        saving = costs.cpu - costs.device
        self._reuse = costs.copy / saving if saving > 0 else float("inf")
        self._nways = geometry.nways
        self._calls = [0.0] * (geometry.layers * geometry.experts)
        self._fills = [0.0] * geometry.nblocks
        self._weight = 1.0  # of a call now; growing it ages all calls before

    @property
    def reuse(self) -> float:
        """Calls that pay for a copy; infinite if the device saves nothing."""
        return self._reuse

    def on_step(self) -> None:
        self._weight *= 2.0 ** (1 / HALF_LIFE)
        if self._weight > _RESCALE_AT:
            self._calls = [count / self._weight for count in self._calls]
            self._fills = [count / self._weight for count in self._fills]
            self._weight = 1.0

    def on_call(self, keys: Sequence[int]) -> None:
        calls, weight = self._calls, self._weight
        for key in keys:
            calls[key] += weight

    def on_fill(self, index: int) -> None:
        self._fills[index] += self._weight

    def wants(self, index: int, key: int) -> bool:
        return self.expected_reuse(index, key) > self._reuse

    def expected_reuse(self, index: int, key: int) -> float:
        """Calls of an expert, after this one, before it would be evicted."""
        others = self._calls[key] / self._weight - 1
        fills = self._fills[index] / self._weight
        return others if fills <= self._nways else others * self._nways / fills


ADMISSIONS: Mapping[str, type[Admission]] = {rule.name: rule for rule in (Admission, SecondTouch, BreakEven)}


GROUP = "hybrid.admissions"  # of entry points
HOOKS = ("on_step", "on_call", "on_fill", "wants")


def names_of_admissions() -> tuple[str, ...]:
    """Ours, and those that installed packages offer."""
    return (*ADMISSIONS, *entry_names(GROUP))


def make_admission(name: str, geometry: Geometry, costs: Costs | None = None) -> Admission:
    """The rule with this name, as `known_admission` takes it. Raises CacheError if it is unknown, cannot be used, or
    needs missing costs.
    """
    kind = admission_class(name)
    if kind in ADMISSIONS.values():
        return kind(geometry, costs)
    return guarded_admission(kind, geometry, costs)


def guarded_admission(kind: type[Admission], geometry: Geometry, costs: Costs | None = None) -> Admission:
    """A rule whose errors and wrong answers are a CacheError with file, line and rule."""
    made_from = "a rule is made from a geometry and costs, which may be None"
    rule = make_outside(kind, made_from, geometry=geometry, costs=costs)
    guard(rule, [hook for hook in HOOKS if overridden(getattr(rule, hook), getattr(Admission, hook))])
    check_answers(rule, "wants", _yes_or_no)
    return rule


def _yes_or_no(answer: object) -> bool:
    if type(answer).__name__ not in ("bool", "bool_"):  # of numpy, too
        raise TypeError("it is True or False")
    return bool(answer)


def admission_class(name: str) -> type[Admission]:
    """The class of a rule. Raises CacheError if there is none, or if its file or package cannot be used."""
    name = known_admission(name)
    if name in ADMISSIONS:
        return ADMISSIONS[name]
    return class_of_file(name, Admission) if is_file(name) else class_of_entry(name, GROUP, Admission)


def known_admission(name: str) -> str:
    """The name as `ADMISSIONS` spells it, for a name in any case; the name itself if it is a file, or one that an
    installed package offers. Raises CacheError if it is unknown.
    """
    if name.lower() in ADMISSIONS:
        return name.lower()
    if is_file(name):
        class_of_file(name, Admission)
        return name
    if found := next((known for known in entry_names(GROUP) if known.lower() == name.lower()), None):
        return found
    raise CacheError(f"admission {name!r} is unknown: use one of {', '.join(ADMISSIONS)}, or FILE.py:CLASS")
