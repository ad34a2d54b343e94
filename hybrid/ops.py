"""What a step is written in: ops, and references to what they work on, which the engine turns into addresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Buffer:
    """Address of a named part of the arena, or of that of a memory node, `offset` bytes into it."""

    name: str
    offset: int = 0
    node: int = -1


@dataclass(frozen=True)
class Weight:
    """Address of a tensor of the store, or of the part that a memory node has of it, `offset` bytes into it."""

    name: str
    offset: int = 0
    node: int = -1


@dataclass(frozen=True)
class Kv:
    """The KV layout of a layer."""

    layer: int


@dataclass(frozen=True)
class RoutingTable:
    """The five arrays that say which rows go to which expert, `name`.offsets and so on.

    rows: which array takes the place of the rows: "pairs" numbers (row, rank) pairs instead.
    """

    name: str
    rows: str = "rows"


@dataclass(frozen=True)
class Callback:
    """What the engine does at this point of a step, `kind` of it, in a layer.

    layer: of those with experts, counting them alone; with a kind of `hybrid.plan.passes.gpu_step`, of all.
    """

    kind: str
    layer: int


@dataclass(frozen=True)
class Choice:
    """A member of an enumeration of `cpu_kernels`: Choice("Format", "int8")."""

    kind: str
    name: str


@dataclass(frozen=True)
class ExpertSet:
    """A second set of experts for one op: the arguments of `cpu_kernels.ExpertSet`, numbers or references."""

    arguments: dict[str, Any]


@dataclass(frozen=True)
class Op:
    """One kernel call. `arguments` are numbers or one of the references above; None is a null address, and a tuple
    of references a list of addresses.

    split: how many independent units the threads share, and what they are called.
    """

    kind: str
    part: str
    arguments: dict[str, Any]
    split: tuple[int, str]
    layer: int | None = None
