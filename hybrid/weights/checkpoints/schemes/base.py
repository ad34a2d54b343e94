"""What published quantisations share: a matrix that several tensors of a checkpoint make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from hybrid.weights.checkpoints.matrices import Source
from hybrid.weights.shard import Entry

ROUND = "give another --format, as bf16 or int8, which rounds it"  # what to do where a format cannot hold a matrix


@dataclass(frozen=True)
class MatrixEntry(Entry, ABC):
    """A matrix [outputs, inputs] under the name that it would have unquantised; dtype and bytes are those of its codes.

    words: how it is published, for people. holds: the packed formats that hold it exactly.
    """

    words: str
    holds: tuple[str, ...]

    @abstractmethod
    def source(self, name: str, start: int, count: int, step: int) -> Source:
        """`count` rows, from row `start` on, each `step`-th."""


class Scheme(Protocol):
    """How the matrices of a checkpoint are published."""

    @property
    def format(self) -> str:
        """The packed format of most checkpoints of this kind, for where no tensors are at hand."""

    def matrices(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, MatrixEntry]]:
        """The matrices that are found among these tensors, by name. Raises `WeightsError`."""
