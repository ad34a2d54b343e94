"""Ops of a plan onto an executor: every reference becomes the address, layout or callable that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import cpu_kernels
from hybrid.ops import Buffer, Callback, Choice, ExpertSet, Op, RoutingTable, State, Weight


class References(Protocol):
    """Where the things are that ops refer to; addresses must live as long as the executor."""

    def buffer(self, name: str, node: int = -1) -> int: ...

    def weight(self, name: str, node: int = -1) -> int: ...

    def state(self, layer: int, offset: int) -> Any:
        """The layout of a layer's state from `offset` bytes on, of a class of `cpu_kernels`."""

    def callback(self, kind: str, layer: int) -> Callable[[], None]:
        """The executor keeps it alive: it must not refer to the executor."""


def bind(executor: cpu_kernels.Executor, ops: Iterable[Op], references: References) -> cpu_kernels.Executor:
    """Add every op; returns the executor."""
    for op in ops:
        arguments = {name: resolve(value, references) for name, value in op.arguments.items()}
        getattr(executor, op.kind)(part=getattr(cpu_kernels.Part, op.part), **arguments)
    return executor


def resolve(value: Any, at: References) -> Any:
    match value:
        case None:
            return 0
        case Buffer(name, offset, node):
            return at.buffer(name, node) + offset
        case Weight(name, offset, node):
            return at.weight(name, node) + offset
        case tuple():
            return [resolve(one, at) for one in value]
        case Choice():
            return choose(value)
        case State(layer, offset):
            return at.state(layer, offset)
        case Callback(kind, layer):
            return at.callback(kind, layer)
        case ExpertSet(arguments):
            return cpu_kernels.ExpertSet(**{name: resolve(inner, at) for name, inner in arguments.items()})
        case RoutingTable(name, rows, start):
            parts = {part: at.buffer(f"{name}.{part}") for part in ("weights", "active", "count")}
            offsets = at.buffer(f"{name}.offsets") + start
            return cpu_kernels.Routing(offsets=offsets, rows=at.buffer(f"{name}.{rows}"), **parts)
    return value


def choose(value: Any) -> Any:
    """A choice as the member of its enumeration of `cpu_kernels`; what is none as it is."""
    return getattr(getattr(cpu_kernels, value.kind), value.name) if isinstance(value, Choice) else value
