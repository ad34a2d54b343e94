"""Whether admission rules and prefetches keep their rules, as `policy_check` says of policies; any of these by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from gpu_cache.admission import Admission, Costs, admission_class, guarded_admission, names_of_admissions
from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.outside import class_of_file, place_of
from gpu_cache.policies import names_of_policies, policy_class
from gpu_cache.policies.base import Policy
from gpu_cache.policy_check import GEOMETRIES, check_policy, drive, watch
from gpu_cache.prefetch import (
    NEXT_GATE,
    Prefetch,
    guarded_prefetch,
    is_file_of_prefetch,
    names_of_prefetches,
    prefetch_class,
    rule_and_depth,
)
from gpu_cache.table import Table

COSTS = Costs(copy=3e-3, cpu=2e-3, device=1e-3)
DEPTHS = (1, 3)
ADMISSION_RULES = (
    "is made from a geometry and costs",
    "says True or False of every miss",
    "takes failed copies, experts that are there from the start and layers that are left out",
    "says the same of the same calls",
    "neither changes nor keeps what its hooks are given",
)
PREFETCH_RULES = (
    "is made from a geometry and a depth",
    "names experts that a layer has",
    "takes layers that are left out",
    "names the same after the same calls",
    "neither changes nor keeps what it is given",
)
Said = list[tuple[Any, ...]]  # what a rule was asked, and its answer


def class_of(name: str) -> type:
    """The class of a policy, an admission rule or a learnt prefetch, by its name or its file. Raises CacheError."""
    if is_file_of_prefetch(name):
        kind: type = class_of_file(rule_and_depth(name)[0], *KINDS)
        return kind
    for _, names, of in _named():
        if found := next((known for known in names if known.lower() == name.lower()), None):
            return of(found)
    known = ", ".join(name for _, names, _ in _named() for name in names)
    raise CacheError(f"{name!r} is no policy, no admission rule and no prefetch: use one of {known}, or FILE.py:CLASS")


def described() -> dict[str, dict[str, str]]:
    """Of every kind what there is by name, with the first line of what it says of itself."""
    return {title: {name: _described(name, of) for name in names} for title, names, of in _named()}


def _described(name: str, of: Callable[[str], type]) -> str:
    """What a package offers, and cannot be used, says so; the others are listed nevertheless."""
    try:
        kind = of(name)
    except CacheError as error:
        return str(error)
    whose = "" if kind.__module__.startswith(f"{__package__}.") else " (of an installed package)"
    return (kind.__doc__ or "").strip().split("\n")[0] + whose


def _named() -> Iterator[tuple[str, Sequence[str], Callable[[str], type]]]:
    """Kinds, their names, and how a class is found by its name."""
    yield "policies", names_of_policies(), policy_class
    yield "admission rules", names_of_admissions(), admission_class
    yield (
        "prefetches",
        [rule for rule in names_of_prefetches() if rule not in (Prefetch.name, NEXT_GATE)],
        prefetch_class,
    )


def check(kind: type) -> list[str]:
    """The rules that were tried with a class of `class_of`. Raises CacheError with file, line and the first broken."""
    return next(check_kind for base, check_kind in KINDS.items() if issubclass(kind, base))(kind)


def check_admission(kind: type[Admission]) -> list[str]:
    if kind.wants is Admission.wants and kind is not Admission:
        raise CacheError(f"{place_of(kind)}: {kind.__name__} has no wants; a rule says which misses are copied")
    for geometry in GEOMETRIES:
        _compare(kind, "wants", f"{geometry.nblocks} x {geometry.nways}", partial(_admit, kind, geometry))
    return list(ADMISSION_RULES)


def check_prefetch(kind: type[Prefetch]) -> list[str]:
    for geometry, depth in product(GEOMETRIES[:2], DEPTHS):  # a rule sees the layers and experts alone
        where = f"{geometry.nblocks} x {geometry.nways}, depth {depth}"
        _compare(kind, _chooses(kind), where, partial(_copy_ahead, kind, geometry, depth))
    return list(PREFETCH_RULES)


KINDS: Mapping[type, Callable[[Any], list[str]]] = {
    Policy: check_policy,
    Admission: check_admission,
    Prefetch: check_prefetch,
}


def _compare(kind: type, hook: str, where: str, drive: Callable[[bool], Said]) -> None:
    """drive: what a rule says while a table is driven; given True, what its hooks are given is emptied after them."""
    said = drive(False)
    for spoil, what in (
        (False, "the second time ({}); the same calls give the same"),
        (True, "when its arguments changed later ({}); copy what you keep"),
    ):
        if said != drive(spoil):
            raise CacheError(
                f"{place_of(getattr(kind, hook))}: {hook} of {kind.__name__} answered otherwise {what.format(where)}"
            )


def _admit(kind: type[Admission], geometry: Geometry, spoil: bool) -> Said:
    said: Said = []
    rule = guarded_admission(kind, geometry, COSTS)
    watch(rule, "wants", spoil, said)
    if kind.on_call is not Admission.on_call:
        watch(rule, "on_call", spoil)
    drive(Table(geometry, "LRU", rule))
    return said


def _copy_ahead(kind: type[Prefetch], geometry: Geometry, depth: int, spoil: bool) -> Said:
    said: Said = []
    rule = guarded_prefetch(kind, geometry, depth)
    if kind.learn is not Prefetch.learn:
        watch(rule, "learn", spoil)
    watch(rule, _chooses(kind), spoil, said)
    drive(Table(geometry), rule=rule)
    return said


def _chooses(kind: type[Prefetch]) -> str:
    return "choose" if kind.follow is Prefetch.follow else "follow"
