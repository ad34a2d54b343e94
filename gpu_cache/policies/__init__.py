"""Replacement policies, one file each: every `Policy` here that has a name is one, nothing else registers it.

Others come from a user's file, `my_policy.py:MyPolicy`, or from a package with an entry point of `GROUP`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.outside import class_of_entry, class_of_file, entry_names, is_file
from gpu_cache.policies.base import Policy
from gpu_cache.policies.guarded import guarded_policy

GROUP = "hybrid.policies"


def _found() -> Iterator[type[Policy]]:
    for module in iter_modules(__path__, f"{__name__}."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.name and value.name:
                yield value


POLICIES: Mapping[str, type[Policy]] = {
    policy.name: policy for policy in sorted(_found(), key=lambda policy: policy.name.lower())
}


def names_of_policies() -> tuple[str, ...]:
    """Ours, and those that installed packages offer."""
    return (*POLICIES, *entry_names(GROUP))


def make_policy(name: str, geometry: Geometry, seed: int = 0) -> Policy:
    """A policy by its name as `known_policy` takes it. Raises CacheError. seed: for random policies.

    What a policy of a user does wrong is a CacheError, too, when it happens.
    """
    kind = policy_class(name)
    return kind(geometry, seed) if kind in POLICIES.values() else guarded_policy(kind, geometry, seed)


def policy_class(name: str) -> type[Policy]:
    """The class of a policy. Raises CacheError if there is none, or if its file or package cannot be used."""
    name = known_policy(name)
    if name in POLICIES:
        return POLICIES[name]
    return class_of_file(name, Policy) if is_file(name) else class_of_entry(name, GROUP, Policy)


def known_policy(name: str, policies: Collection[str] = POLICIES.keys()) -> str:
    """The name as it is spelt in the list of policies, for a name in any case; the name itself if it is a file, or one
    that an installed package offers. Raises CacheError if it is unknown.
    """
    for known in policies:
        if known.lower() == name.lower():
            return known
    if is_file(name):
        class_of_file(name, Policy)
        return name
    for known in entry_names(GROUP):
        if known.lower() == name.lower():
            return known
    raise CacheError(f"replacement policy {name!r} is unknown: use one of {', '.join(policies)}, or FILE.py:CLASS")
