"""The packed layout of a matrix and of an expert, whatever the format: their blocks, their bytes, and where parts lie.

A matrix W [n outputs, k inputs] is packed as blocks of 16 output columns, each a header of scales and a stream of
64-byte lines, so that one line is one vector operand and the kernels of every instruction set stream it in order
(`formats/` has a file for each format). n is padded to 16 and k to 64. The gate and up matrices of an expert are
interleaved by block (gate 0, up 0, gate 1, ...), and followed by its down matrix: one expert is one contiguous blob. An
expert without a gate has up alone before down: one wide matrix, not two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid.errors import ConfigError
from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK, K_ALIGN, Array, Bytes, round_up

LAYOUT_VERSION = 5


@dataclass(frozen=True)
class Run:
    """`count` packed blocks in a row, each of `inputs` (padded) inputs."""

    inputs: int
    count: int


def matrix_formats(format: str, count: int = 2) -> tuple[str, ...]:
    """The format of each of `count` matrices, of gate and up and of down if it is 2, for what is written "int4", or
    "int4/int8" with a name for each. Raises ConfigError for another number of names.
    """
    names = tuple(format.split("/"))
    if len(names) not in (1, count):
        raise ConfigError(
            f"format {format!r} names {len(names)} formats, and there is a layer with {count} such matrices; name one "
            f"for all, or {count} if every layer has so many"
        )
    return names * count if len(names) == 1 else names


def packed_bytes(format: str, n: int, k: int) -> int:
    """Bytes of a packed [n, k] matrix."""
    return run_bytes(format, matrix_runs(n, k))


def expert_bytes(format: str, hidden: int, intermediate: int, wide: int = 2) -> int:
    """Bytes of one expert's blob: gate and up, then down."""
    return run_bytes(format, expert_runs(hidden, intermediate, wide))


def down_offset(format: str, hidden: int, intermediate: int, wide: int = 2) -> int:
    """Bytes from the start of an expert's blob to its down matrix."""
    return wide * packed_bytes(matrix_formats(format)[0], intermediate, hidden)


def matrix_runs(n: int, k: int) -> tuple[Run, ...]:
    """The blocks of a matrix [n, k]."""
    return (Run(round_up(k, K_ALIGN), round_up(n, BLOCK) // BLOCK),)


def expert_runs(hidden: int, intermediate: int, wide: int = 2) -> tuple[Run, ...]:
    """The blocks of an expert: its wide matrices interleaved, gate and up or up alone, then down."""
    (gate_up,), (down,) = matrix_runs(intermediate, hidden), matrix_runs(hidden, intermediate)
    return Run(gate_up.inputs, wide * gate_up.count), down


def pack_gate_up(format: str, gate: Array, up: Array) -> Bytes:
    """Gate and up [n, k] as blocks, interleaved: gate 0, up 0, gate 1, ..."""
    return interleave(FORMATS[format].pack(gate), FORMATS[format].pack(up))


def interleave(gate: Bytes, up: Bytes) -> Bytes:
    """Packed blocks of gate and of up, in turn."""
    return np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])


def pack_expert(format: str, gate: Array, up: Array, down: Array) -> Bytes:
    """One expert's blob, [expert_bytes], of gate, up [intermediate, hidden] and down [hidden, intermediate]."""
    first, second = matrix_formats(format)
    return np.concatenate([pack_gate_up(first, gate, up).reshape(-1), FORMATS[second].pack(down).reshape(-1)])


def run_bytes(format: str, runs: tuple[Run, ...]) -> int:
    """Bytes of the packed blocks of a matrix, or of an expert."""
    pairs = zip(runs, matrix_formats(format), strict=False)
    return sum(run.count * FORMATS[name].block_bytes(run.inputs) for run, name in pairs)
