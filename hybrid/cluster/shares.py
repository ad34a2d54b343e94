"""How the processors and the memory of machines are shared out to the replicas that run there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.machine.hardware import MemoryNode, probe


def processors_each(machines: Sequence[int], replicas: int, threads: int | None) -> int:
    """Processors of one replica: its threads, or as many as let all replicas have the same.

    machines: the processors of each. Raises ConfigError where there are too few of them.
    """
    each = threads or max(machines, default=0)
    while each > 1 and not threads and _places(machines, each) < replicas:
        each -= 1
    if _places(machines, max(each, 1)) < replicas:
        wanted = f"{replicas} replicas of {each} threads" if threads else f"{replicas} replicas"
        raise ConfigError(
            f"{wanted} are too many for {sum(machines)} processors on {len(machines)} machines; give "
            f"--replicas at most {_places(machines, max(each, 1))}, or fewer --threads"
        )
    return each


def _places(machines: Sequence[int], each: int) -> int:
    return sum(processors // each for processors in machines)


def share(config: EngineConfig, threads: int, together: int, place: int) -> EngineConfig:
    """The configuration of one of several replicas on this machine, whose memory they share equally.

    threads: of each. together: how many may run here. place: its number among them. Where the machine has as many
    memory nodes as replicas, this process keeps to the processors of one, and so to the memory next to them.
    """
    shared = replace(config, threads=threads, memory_share=together)
    if together > 1 and config.numa == "auto":
        bind(probe().nodes, together, place)
        shared = replace(shared, numa="off")
    return shared


def bind(nodes: Sequence[MemoryNode], together: int, place: int) -> bool:
    """Keep this thread, and those that it starts, to the processors of a node where there is one for each replica."""
    if len(nodes) != together:
        return False
    os.sched_setaffinity(0, nodes[place % together].cpus)
    return True
