"""A matrix that is published as codes in words of 32 bits, with scales and perhaps zeros for groups of inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NoReturn

import numpy as np

from hybrid.errors import WeightsError
from hybrid.formats import GROUPED, INT4, INT8
from hybrid.formats.block import BLOCK, GROUP, Array, Bytes, Floats
from hybrid.formats.grouped import exact_halves
from hybrid.weights.checkpoints.matrices import FLOATS, Source
from hybrid.weights.checkpoints.schemes.base import ROUND, MatrixEntry
from hybrid.weights.checkpoints.schemes.words import IN_ORDER, unpacked, unpacked_less
from hybrid.weights.shard import Entry, read_bytes

_LARGEST_SCALE = np.finfo(np.float32).max / np.float32(256)  # codes less zeros are less than 256


@dataclass(frozen=True)
class Layout:
    """How the tensors of such a matrix are named, and how they lie.

    codes, scales, zeros: what the names end with; order: the group of each input; shape: that of the matrix.
    transposed: whether tensors are [inputs, outputs]. along_rows: whether the codes of a word are of neighbouring
    outputs, as those of zeros always are, and not of inputs. word: which of its eight neighbours the i-th code of a
    word is. zeros_less: whether zeros are stored one less than they are. always_zeros: whether there are zeros even
    where all of them are in the middle.
    """

    codes: str
    scales: str
    zeros: str
    order: str = ""
    shape: str = ""
    transposed: bool = False
    along_rows: bool = False
    word: tuple[int, ...] = IN_ORDER
    zeros_less: bool = False
    always_zeros: bool = False


@dataclass(frozen=True)
class Parts:
    """The tensors of a matrix."""

    codes: Entry
    scales: Entry
    zeros: Entry | None
    order: Entry | None
    shape: Entry | None


@dataclass(frozen=True)
class CodesEntry(MatrixEntry):
    """bits: of a code. group: inputs that share a scale. symmetric: whether all zeros are in the middle."""

    parts: Parts = field(kw_only=True)
    layout: Layout = field(kw_only=True)
    bits: int = field(kw_only=True)
    group: int = field(kw_only=True)
    symmetric: bool = field(kw_only=True)

    def source(self, name: str, start: int, count: int, step: int) -> Source:
        return CodesSource(name, self, start, count, step)


@dataclass(frozen=True)
class CodesSource(Source):
    """Rows of such a matrix. published: the format that they are packed in without loss."""

    entry: CodesEntry
    published: str | None = None  # type: ignore[misc]

    @property
    def straight(self) -> bool:
        return self.step == 1 and self.start % BLOCK == 0

    def packed_as(self, format: str) -> Source:
        return replace(self, published=format if format in self.entry.holds else None)

    def floats(self, start: int, stop: int) -> Floats:
        codes, scales = self._codes_and_scales(start, stop)
        values: Floats = codes.astype(np.float32)
        values *= scales.astype(np.float32)[:, self._groups]
        return values

    def blocks(self, start: int, stop: int) -> Bytes:
        assert self.published is not None
        codes, scales = self._codes_and_scales(start, stop)
        if not self._is_in_order:
            self._refuse(f"has groups in another order than inputs, which {self.published} does not hold", ROUND)
        if self.published == "int8":
            return INT8.pack_blocks(codes, scales.astype(np.float32)[:, 0])
        inputs = self.entry.shape[1]
        wide = scales[:, np.arange(0, inputs, GROUP) // self.entry.group]
        if self.published == "int4":
            return INT4.pack_blocks((codes + np.int8(8)).view(np.uint8), wide)
        format = GROUPED[self.published]
        try:
            halves = wide if wide.dtype == np.float16 else exact_halves(wide)
        except ValueError as error:
            self._refuse(f"cannot be packed in {format.name} as it is: {error}", ROUND)
        return format.pack_blocks(
            (codes + np.int8(format.offset)).view(np.int8 if format.bits == 8 else np.uint8), halves
        )

    def _codes_and_scales(self, start: int, stop: int) -> tuple[Array, Array]:
        """Codes [rows, inputs] less their zeros, and scales [rows, groups]."""
        rows = slice(self.start + start * self.step, self.start + (stop - 1) * self.step + 1, self.step)
        parts, inputs = self.entry.parts, self.entry.shape[1]
        if self.entry.layout.transposed:
            codes, scales = (part[rows] for part in self._turned)
        else:
            self._require_shape(start)
            codes = unpacked(_stored(parts.codes, rows), self.entry.bits)[:, :inputs]
            scales = _stored(parts.scales, rows)
        if not (np.abs(scales.astype(np.float32)) <= _LARGEST_SCALE).all():
            raise self._bad_scales()
        if self._zeros is None:  # unsigned numbers that wrap are the signed ones
            return (codes - np.uint8(1 << self.entry.bits - 1)).view(np.int8), scales
        zeros = self._zeros[rows][:, self._groups]
        return codes.astype(np.int16) - zeros if self.entry.bits == 8 else (codes - zeros).view(np.int8), scales

    def _require_shape(self, start: int) -> None:
        """What a tensor says of the shape must be what the words hold; looked at once."""
        if (
            start == 0
            and (part := self.entry.parts.shape)
            and (stored := integers(part).tolist()) != [*self.entry.shape]
        ):
            self._refuse(f"has the {self.entry.layout.shape} {stored[:4]}, and codes for {[*self.entry.shape]}")

    @cached_property
    def _turned(self) -> tuple[Bytes, Array]:
        """Codes and scales of all rows, whose values lie scattered over transposed tensors."""
        entry, (outputs, inputs) = self.entry, self.entry.shape
        words = _stored(entry.parts.codes)
        if entry.layout.along_rows:
            codes = np.ascontiguousarray(unpacked(words, entry.bits, entry.layout.word)[:, :outputs].T)
        else:
            codes = unpacked(np.ascontiguousarray(words.T), entry.bits, entry.layout.word)[:, :inputs]
        return codes, np.ascontiguousarray(_stored(entry.parts.scales).T)

    @cached_property
    def _zeros(self) -> Bytes | None:
        """Those of all rows, [rows, groups]; None if they are in the middle."""
        entry, layout, part = self.entry, self.entry.layout, self.entry.parts.zeros
        if part is None:
            return None
        words = _stored(part) if layout.transposed else np.ascontiguousarray(_stored(part).T)
        if entry.symmetric:
            # Some programs store what they are in either version, whatever config.json calls it.
            stored, middle = unpacked(words, entry.bits)[:, : entry.shape[0]], 1 << entry.bits - 1
            if not any((stored == zero).all() for zero in (middle - 1, middle)):
                self._refuse(f"has zeros other than {middle}, and config.json calls its codes symmetric")
            return None
        less = layout.zeros_less
        zeros = unpacked_less(words, entry.bits) if less else unpacked(words, entry.bits, layout.word)
        return zeros[:, : entry.shape[0]].T

    @cached_property
    def _groups(self) -> Array:
        """The group of each input. Raises `WeightsError` for groups that do not exist."""
        inputs, part = self.entry.shape[1], self.entry.parts.order
        if part is None:
            return np.arange(inputs) // self.entry.group
        found = integers(part)
        if found.min() < 0 or found.max() > (inputs - 1) // self.entry.group:
            self._refuse(f"has the groups {found[:4].tolist()} ... in {self.entry.layout.order}, some of which are not")
        return found

    @cached_property
    def _is_in_order(self) -> bool:
        return bool((self._groups == np.arange(self.entry.shape[1]) // self.entry.group).all())

    def _refuse(self, reason: str, instead: str = "take another checkpoint") -> NoReturn:
        raise WeightsError(f"{self.entry.path}: tensor {self.name} {reason}: {instead}")


def _stored(entry: Entry, rows: slice = slice(None)) -> Array:
    """Rows of a tensor of two dimensions: words as uint32, scales in their own type."""
    dtype = np.dtype(FLOATS.get(entry.dtype, np.uint32))
    first, last, step = rows.indices(entry.shape[0])
    size = entry.shape[1] * dtype.itemsize
    found: Array = read_bytes(entry, first * size, last * size).view(dtype).reshape(-1, entry.shape[1])[::step]
    return found


def integers(entry: Entry) -> Array:
    """All of a small tensor of integers."""
    found: Array = read_bytes(entry, 0, entry.end - entry.start).view(np.int32 if entry.dtype == "I32" else np.int64)
    return found
