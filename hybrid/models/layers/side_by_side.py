"""Matrices that read the same rows and write their products side by side: neighbours of one format are one matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from hybrid.formats.rows import row_stride
from hybrid.models.layers.products import NORMED, gemm
from hybrid.models.tensors import PerHead, Shard, Stacked, StoreTensor
from hybrid.ops import Op


@dataclass(frozen=True)
class Piece:
    """What has a format of its own. name: short. sources: the rows of a checkpoint that it is made of. rows: of all."""

    name: str
    sources: tuple[str | PerHead, ...]
    rows: int


@dataclass(frozen=True)
class Joined:
    """Neighbours of one format. name: of their matrix. first: the column at which their products begin. position: of
    the first of them.
    """

    name: str
    format: str
    pieces: tuple[Piece, ...]
    first: int
    position: int

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)


def joined(name: str, pieces: Sequence[Piece], formats: Sequence[str]) -> list[Joined]:
    """The matrices of these pieces, the format of each given. name: that of the matrix if it is one for all."""
    found: list[Joined] = []
    for format, group in groupby(range(len(pieces)), formats.__getitem__):
        positions = list(group)
        own = tuple(pieces[position] for position in positions)
        whole = name if len(own) == len(pieces) else f"{name}_{''.join(piece.name for piece in own)}"
        first = sum(piece.rows for piece in pieces[: positions[0]])
        found.append(Joined(whole, format, own, first, positions[0]))
    return found


def joined_tensors(
    matrices: Sequence[Joined], module: str, part: str, shard: Shard, inputs: int, bias: bool = False
) -> Iterator[StoreTensor]:
    """Their stored tensors. inputs: columns of the matrices. bias: whether every source has one."""
    for matrix in matrices:
        sources = [source for piece in matrix.pieces for source in piece.sources]
        positions = {
            source.name if isinstance(source, PerHead) else source: matrix.position + number
            for number, piece in enumerate(matrix.pieces)
            for source in piece.sources
        }
        name = f"{module}.{matrix.name}"
        yield shard.matrix(
            name, part, Stacked(tuple(sources)), matrix.format, matrix.rows, inputs, tuple(positions.values())
        )
        if bias:
            yield shard.bias(f"{name}_bias", part, tuple(positions), matrix.rows)


def joined_gemms(
    matrices: Sequence[Joined], module: str, part: str, target: str, inputs: int, bias: bool = False
) -> Iterator[Op]:
    """Their products with the normed rows. target: the buffer of all products."""
    stride = row_stride(sum(matrix.rows for matrix in matrices))
    for matrix in matrices:
        yield gemm(
            part, matrix.format, NORMED, f"{module}.{matrix.name}", target, matrix.rows, inputs, stride, bias=bias,
            first=matrix.first,
        )  # fmt: skip
