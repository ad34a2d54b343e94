"""Which memory nodes a plan uses, and which processors its threads run on."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.machine.hardware import HardwareSpec, place_threads


@dataclass(frozen=True)
class NodeChoice:
    """ids: the system's numbers of the nodes, -1 for simulated ones and where there is only one. cpus: for each node
    the processors among which the system places its threads, or none. note: why --numa auto uses one node of several,
    or "".

    No thread has a processor of its own: other programs run on some, another process of this one too, and the system
    knows which are free.
    """

    ids: tuple[int, ...]
    cpus: tuple[tuple[int, ...], ...]
    note: str = ""


def choose_nodes(hardware: HardwareSpec, config: EngineConfig, threads: int) -> NodeChoice:
    """What --numa means on this machine. Raises ConfigError if it cannot be met."""
    own = len(hardware.nodes)
    if config.numa in ("auto", "off"):
        note = _against(hardware, config, threads) if config.numa == "auto" and own > 1 else ""
        wanted = own if config.numa == "auto" and own > 1 and not note else 1
    else:
        note, wanted = "", int(config.numa)
        _check_wanted(config, wanted, threads)
    placed = place_threads(hardware.nodes, threads) if wanted == own > 1 else ()
    if placed:
        return NodeChoice(tuple(node.id for node in hardware.nodes), placed)
    enough = threads <= len(hardware.cpus)
    return NodeChoice((-1,) * wanted, (hardware.cpus,) * wanted if enough else (), note)


def _against(hardware: HardwareSpec, config: EngineConfig, threads: int) -> str:
    """Why a machine of several nodes is used as one, or "" if nothing speaks against using them."""
    machine = f"this machine's {len(hardware.nodes)} memory nodes are used as one: "
    if config.load == "map":
        return machine + "--load map keeps the weights in one piece"
    if threads < len(hardware.nodes):
        return machine + f"{threads} threads are fewer"
    if not place_threads(hardware.nodes, threads):
        return machine + f"{threads} threads cannot be shared equally by their processors"
    return ""


def _check_wanted(config: EngineConfig, nodes: int, threads: int) -> None:
    if nodes > threads:
        raise ConfigError(
            f"--numa {nodes} is above the {threads} threads, but every node needs one of its own: "
            f"use --numa auto, off or at most {threads}, or raise --threads"
        )
    if nodes > 1 and config.load == "map":
        raise ConfigError(
            f"--load map keeps the weights in one piece, which --numa {nodes} must split: use --load auto or copy"
        )


def node_threads(threads: int, nodes: int, node: int) -> int:
    """How many of the threads work on a node, as `cpu_kernels.ThreadPool` cuts them."""
    return threads * (node + 1) // nodes - threads * node // nodes
