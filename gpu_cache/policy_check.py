"""Whether a policy keeps the rules of `Policy`: small caches are driven, and the same once more in other ways."""

from __future__ import annotations

from collections.abc import Collection
from random import Random
from typing import Any

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.outside import place_of
from gpu_cache.policies.base import Policy
from gpu_cache.policies.guarded import guarded_policy
from gpu_cache.prefetch import Prefetch
from gpu_cache.table import Table

LAYERS, EXPERTS, STEPS = 4, 12, 120
# an index a layer, layers that share one, several a layer, any keys together, layers without one; one way, all ways
GEOMETRIES = (
    Geometry(4, 4, LAYERS, EXPERTS),
    Geometry(2, 6, LAYERS, EXPERTS),
    Geometry(1, 20, LAYERS, EXPERTS),
    Geometry(8, 3, LAYERS, EXPERTS),
    Geometry(3, 5, LAYERS, EXPERTS, "hash"),
    Geometry(2, 4, LAYERS, EXPERTS, "prefix"),
    Geometry(4, 1, LAYERS, EXPERTS),
    Geometry(4, EXPERTS, LAYERS, EXPERTS),
)
Choices = list[tuple[int, int, int | None]]  # (index, key, slot) of every `replace`
RULES = (
    "is made from a geometry and a seed",
    "evicts a slot of the index that is neither pinned nor loading, whenever there is one",
    "takes calls without scores, failed copies and experts that are there from the start",
    "does the same with the same seed",
    "neither changes nor keeps what its hooks are given",
    "looks at nothing but an index and its layers to choose there",
)


def check_policy(kind: type[Policy]) -> list[str]:
    """The rules that were tried, of which one may not apply. Raises CacheError with file, line and the first broken."""
    kept = list(RULES)
    for geometry in GEOMETRIES:
        first = _choices(kind, geometry)
        if first != _choices(kind, geometry):
            raise _broken(kind, f"chose otherwise the second time ({_text(geometry)}); the same seed gives the same")
        if first != _choices(kind, geometry, spoil=True):
            raise _broken(
                kind, f"chose otherwise when its arguments changed later ({_text(geometry)}); copy what you keep"
            )
    lots = any(_choices(kind, geometry) != _choices(kind, geometry, seed=1) for geometry in GEOMETRIES)
    if lots:  # draws are shared by all indexes
        kept.remove(RULES[-1])
        return kept
    geometry = GEOMETRIES[0]
    mine, others = _choices(kind, geometry), _choices(kind, geometry, others=1)
    if [choice for choice in mine if not choice[0]] != [choice for choice in others if not choice[0]]:
        raise _broken(kind, f"chose otherwise when other indexes had other calls ({_text(geometry)}); a state for each")
    return kept


def _broken(kind: type[Policy], what: str) -> CacheError:
    return CacheError(f"{place_of(kind.replace)}: {kind.__name__} {what}")


def _text(geometry: Geometry) -> str:
    return f"{geometry.nblocks} x {geometry.nways} {geometry.mapping}"


def _choices(kind: type[Policy], geometry: Geometry, spoil: bool = False, seed: int = 0, others: int = 0) -> Choices:
    """What a policy evicts while a table is driven. spoil: what the hooks are given becomes garbage after them.
    others: another number gives the layers but the first other calls.
    """
    made: Choices = []
    drive(Table(geometry, _watched(guarded_policy(kind, geometry, seed), made, spoil)), others)
    return made


def drive(table: Table, others: int = 0, rule: Prefetch | None = None) -> None:
    """Send made-up calls through a table, with experts that are there from the start, calls without scores, layers that
    are left out, and copies that are late and that fail. others: another number gives the layers but the first other
    calls. rule: names experts that are copied ahead.
    """
    table.preload(range(0, LAYERS * EXPERTS, 9))
    first, rest = Random(1), Random(2 + others)
    copies: list[int] = []
    for step in range(STEPS):
        table.begin_step(step)
        for layer in range(LAYERS):
            for slot in copies if step % 7 else ():  # at times copies are late, at times one fails
                (table.publish if (7 * slot + step) % 31 else table.abandon)(slot)
            copies = copies if not step % 7 else []
            if (5 * step + layer) % 17 == 3:
                continue
            random = rest if layer else first
            experts = random.sample(range(EXPERTS // 2), 2) + random.sample(range(EXPERTS // 2, EXPERTS), 1)
            scores = [random.random() for _ in experts]
            table.lookup(layer, experts, scores if step % 3 else None)
            fills = table.admit()
            if rule is not None:
                named = rule.follow(layer, experts)
                fills += table.prefetch(rule.ahead(layer), named)
            copies = copies + [fill.slot for fill in fills]
            table.release()
        table.check_integrity()


def _watched(policy: Policy, made: Choices, spoil: bool) -> Policy:
    """The policy, with its choices written down, and its arguments compared before and after."""
    choose = policy.replace

    def replace(index: int, key: int, blocked: Collection[int]) -> int | None:
        given = set(blocked)
        slot = choose(index, key, given)
        if given != set(blocked):
            raise _broken(type(policy), "changed the blocked slots; they are the table's")
        nways = policy.nways
        if slot is None and not given.issuperset(range(index * nways, (index + 1) * nways)):
            raise _broken(type(policy), f"evicted nothing from index {index}, where a slot was not blocked")
        if spoil:
            given.clear()
        made.append((index, key, slot))
        return slot

    policy.replace = replace  # type: ignore[method-assign]
    if type(policy).on_lookup is not Policy.on_lookup:
        watch(policy, "on_lookup", spoil)
    return policy


def watch(made: Any, hook: str, spoil: bool, said: list[Any] | None = None) -> None:
    """From now on, a hook that changes the lists that it is given ends in CacheError; what it is asked and answers goes
    to `said`. spoil: the lists become empty after it.
    """
    ask = getattr(made, hook)

    def call(*given: Any) -> Any:
        lent = [list(one) if isinstance(one, list) else one for one in given]
        answer = ask(*lent)
        if lent != list(given):
            kind = type(made)
            raise CacheError(
                f"{place_of(getattr(kind, hook))}: {hook} of {kind.__name__} changed what it was given; "
                "it is the table's"
            )
        if said is not None:
            said.append((hook, *given, answer))
        for one in lent if spoil else ():
            if isinstance(one, list):
                one.clear()
        return answer

    setattr(made, hook, call)
