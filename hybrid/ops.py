"""What a step is written in: ops, and references to what they work on, which the engine turns into addresses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


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
class State:
    """Where the mixer of a layer keeps what it knows of sequences, their keys and values, `offset` bytes into it."""

    layer: int
    offset: int = 0


@dataclass(frozen=True)
class RoutingTable:
    """The five arrays that say which rows go to which expert, `name`.offsets and so on.

    rows: which array takes the place of the rows: "pairs" numbers (row, rank) pairs instead. start: bytes into the
    array of offsets, where every layer may have its own.
    """

    name: str
    rows: str = "rows"
    start: int = 0


@dataclass(frozen=True)
class Callback:
    """What the engine does at this point of a step, `kind` of it, in a layer.

    layer: of those with experts, counting them alone; with a kind of `plan/passes/gpu_step.py`, of all.
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

    split: how many independent units the threads share, and what they are called. layer, half: which half of which
    layer it belongs to; those outside the layers belong to none.
    """

    kind: str
    part: str
    arguments: dict[str, Any]
    split: tuple[int, str]
    layer: int | None = None
    half: Literal["", "mixer", "feed_forward"] = ""


# Every kind of op, and how memory nodes share it: each has output columns of its own, or a part of the intermediate
# dimension of experts; whole: all threads share it, as they do on one node.
KINDS: dict[str, Literal["columns", "intermediate", "whole"]] = {
    "embed": "whole",
    "collapse": "whole",
    "expand": "whole",
    "stream_gates": "whole",
    "ngrams": "whole",
    "lookup": "whole",
    "ngram_gate": "whole",
    "ngram_conv": "whole",
    "rope_table": "whole",
    "norm": "whole",
    "quantise": "intermediate",
    "gemm": "columns",
    "head_gemm": "whole",
    "soft_cap": "whole",
    "qkv": "whole",
    "latent": "whole",
    "attention": "whole",
    "index": "whole",
    "index_scores": "whole",
    "select": "whole",
    "turn": "whole",
    "unturn": "whole",
    "compress": "whole",
    "keep": "whole",
    "entry_scores": "whole",
    "see": "whole",
    "select_pools": "whole",
    "block_scores": "whole",
    "select_blocks": "whole",
    "gate": "whole",
    "short_conv": "whole",
    "silu_conv": "whole",
    "gated_delta": "whole",
    "kimi_delta": "whole",
    "state_space": "whole",
    "group_norm": "whole",
    "router": "whole",
    "topk": "whole",
    "group": "whole",
    "gate_up": "intermediate",
    "down": "intermediate",
    "combine": "whole",
    "join": "whole",
    "host": "whole",
}


def require_known(ops: Iterable[Op]) -> list[Op]:
    """The ops, or ValueError for one whose kind is not in KINDS: no pass may guess what it means."""
    found = list(ops)
    unknown = sorted({op.kind for op in found} - set(KINDS))
    if unknown:
        raise ValueError(f"ops of kind {', '.join(unknown)} are unknown; known: {', '.join(KINDS)}: add them to KINDS")
    return found
