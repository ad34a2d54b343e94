"""Which code a replay runs: results that are kept must not outlive a change of it."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from gpu_cache.admission import admission_class
from gpu_cache.errors import CacheError
from gpu_cache.policies import policy_class
from gpu_cache.prefetch import known_prefetch, prefetch_class


def source_digest(policy: str | None, admission: str = "always", prefetch: str = "none") -> str:
    """A name for the source of a policy, of rules and of the simulator, 16 hexadecimal digits. Raises CacheError if a
    part of it cannot be read. policy: as `known_policy` spells it; None: one that is in the simulator itself.
    """
    roots = ["gpu_cache.simulator", "gpu_cache.costs"]
    kinds: list[type] = [admission_class(admission), prefetch_class(known_prefetch(prefetch))]
    if policy is not None:
        kinds.append(policy_class(policy))
    for kind in kinds:
        roots += [base.__module__ for base in kind.__mro__ if base is not object]
    return digest_of_modules(tuple(roots))


@cache
def digest_of_modules(roots: tuple[str, ...]) -> str:
    """A name for the source of modules and of what they use."""
    digest = hashlib.sha256()
    for name, module in sorted(_closure(list(roots)).items()):
        try:
            digest.update(f"{name}\n{inspect.getsource(module)}".encode())
        except (OSError, TypeError):
            raise CacheError(
                f"the source of {name} cannot be read, so that kept results may be of other code; drop --results"
            ) from None
    return digest.hexdigest()[:16]


def _closure(names: list[str]) -> dict[str, ModuleType]:
    """These modules, and those of the same packages that they use."""
    packages = {name.split(".")[0] for name in names}
    found: dict[str, ModuleType] = {}
    while names:
        name = names.pop()
        if name in found or name.split(".")[0] not in packages or name not in sys.modules:
            continue
        found[name] = sys.modules[name]
        names += _used(found[name])
    return found


def _used(module: ModuleType) -> Iterator[str]:
    """The modules that a module's names come from; that a package has submodules is not to use them."""
    for value in vars(module).values():
        if not isinstance(value, ModuleType):
            yield str(getattr(value, "__module__", ""))
        elif not value.__name__.startswith(f"{module.__name__}."):
            yield value.__name__
