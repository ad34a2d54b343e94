"""Policies that a user brings: what they answer is checked before the table believes it."""

from __future__ import annotations

from collections.abc import Collection

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.hooks import overridden
from gpu_cache.outside import guard, make_outside, place_of
from gpu_cache.policies.base import Policy

HOOKS = ("on_step", "on_lookup", "on_fill", "on_evict")


def guarded_policy(kind: type[Policy], geometry: Geometry, seed: int = 0) -> Policy:
    """A policy whose errors and forbidden victims are a CacheError with file, line and rule. What it leaves out of the
    interface costs nothing, as with the others.
    """
    if kind.replace is Policy.replace:
        raise CacheError(f"{place_of(kind)}: {kind.__name__} has no replace; a policy says which slot it evicts")
    policy = make_outside(kind, "a policy is made from a geometry and a seed", geometry=geometry, seed=seed)
    if getattr(policy, "geometry", None) is not geometry:
        raise CacheError(
            f"{place_of(kind)}: {kind.__name__} has no geometry; its __init__ calls super().__init__(geometry, seed)"
        )
    guard(policy, [name for name in HOOKS if overridden(getattr(policy, name), getattr(Policy, name))])
    guard(policy, ["replace"])
    _check_victims(policy, geometry)
    return policy


def _check_victims(policy: Policy, geometry: Geometry) -> None:
    choose, where = policy.replace, place_of(policy.replace)

    def replace(index: int, key: int, blocked: Collection[int]) -> int | None:
        slot = choose(index, key, blocked)
        if slot is None:
            return None
        if type(slot) is not int:
            raise CacheError(f"{where}: replace returned {slot!r:.80}; a slot is an int, or None if all are blocked")
        if not index * geometry.nways <= slot < (index + 1) * geometry.nways:
            first = index * geometry.nways
            raise CacheError(
                f"{where}: replace returned the foreign slot {slot}; "
                f"index {index} has slots {first} to {first + geometry.nways - 1}"
            )
        if slot in blocked:
            raise CacheError(f"{where}: replace returned the blocked slot {slot}; what is pinned or loading stays")
        return slot

    replace.__wrapped__ = choose  # type: ignore[attr-defined]
    policy.replace = replace  # type: ignore[method-assign]
