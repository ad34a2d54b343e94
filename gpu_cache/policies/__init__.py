"""Replacement policies, one file each: every `Policy` here that has a name is one, nothing else registers it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


def _found() -> Iterator[type[Policy]]:
    for module in iter_modules(__path__, f"{__name__}."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.name and value.name:
                yield value


POLICIES: Mapping[str, type[Policy]] = {policy.name: policy for policy in _found()}


def make_policy(name: str, geometry: Geometry, seed: int = 0) -> Policy:
    """A policy by its name in `POLICIES`, in any case. Raises CacheError if unknown. seed: for random policies."""
    return POLICIES[known_policy(name)](geometry, seed)


def known_policy(name: str, policies: Collection[str] = POLICIES.keys()) -> str:
    """The name as it is spelt in the list of policies, for a name in any case. Raises CacheError if it is unknown."""
    for known in policies:
        if known.lower() == name.lower():
            return known
    raise CacheError(f"replacement policy {name!r} is unknown: use one of {', '.join(policies)}")
