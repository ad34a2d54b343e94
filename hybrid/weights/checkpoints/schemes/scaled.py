"""Matrices that are published as numbers of 4 or 8 bits under their own names, with scales beside them.

Numbers are e4m3, int8, or e2m1 with two in a byte. Scales are one for all, one for each row, for each 128 by 128, or
for each group of inputs; NVFP4 has one more for all. Which it is, the shapes of the stored tensors say.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from hybrid.errors import WeightsError
from hybrid.formats import FP8, FP8_ROW, INT8, MXFP4, NVFP4, Q8_0
from hybrid.formats import fp4 as fp4_format
from hybrid.formats import fp8 as fp8_format
from hybrid.formats import mxfp4 as mxfp4_format
from hybrid.formats import nvfp4 as nvfp4_format
from hybrid.formats.block import BLOCK, GROUP, Array, Bytes, Floats
from hybrid.formats.grouped import exact_halves
from hybrid.weights.checkpoints.matrices import FLOATS, Source
from hybrid.weights.checkpoints.schemes.base import ROUND, MatrixEntry
from hybrid.weights.shard import Entry, read_bytes

E4M3, INT, E2M1 = "F8_E4M3", "I8", "U8"  # dtypes of the numbers
_POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of two
_SQUARE = fp8_format.SQUARE
_REFUSED = ("pre_quant_scale", "weight_g_idx")  # beside numbers that they would change
_ENDINGS = (".weight", ".weight_packed")  # of numbers; only those of 4 bits may have a name of their own
_NAMES = {E4M3: "fp8", INT: "int8", E2M1: "fp4"}
_DIVIDES = "weight_global_scale"  # a scale for all by which others are divided; the other name's multiplies


@dataclass(frozen=True)
class ScaledScheme:
    """format: the packed format of most checkpoints of this kind. symmetric: whether zero points of integers, if there
    are any, are 0.
    """

    format: str
    symmetric: bool = True

    def matrices(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, MatrixEntry]]:
        for name, numbers in entries.items():
            ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
            if ending and numbers.dtype in ((E4M3, INT, E2M1) if ending == ".weight" else (E2M1,)):
                module = name.removesuffix(ending)
                yield f"{module}.weight", scaled_matrix(module, numbers, entries, self.symmetric)


def scaled_matrix(module: str, numbers: Entry, entries: Mapping[str, Entry], symmetric: bool = True) -> ScaledEntry:
    """The matrix of a module, whose parts are among `entries`. Raises `WeightsError` for parts that are missing or do
    not fit each other.
    """
    for part in _REFUSED:
        if f"{module}.{part}" in entries:
            raise WeightsError(
                f"{numbers.path}: tensor {module}.{part} changes what its weights mean, which is not read: take "
                "another checkpoint"
            )
    scales = entries.get(f"{module}.weight_scale") or entries.get(f"{module}.weight_scale_inv")
    if scales is None:
        raise WeightsError(f"{numbers.path}: tensor {module}.weight_scale is missing: fetch all files again")
    rows, inputs = numbers.shape if len(numbers.shape) == 2 else (0, 0)
    inputs *= 2 if numbers.dtype == E2M1 else 1
    each = _values_of_a_scale(rows, inputs, scales.shape)
    allowed = (*FLOATS, *_POWERS, E4M3)
    if each is None or not rows or not inputs or scales.dtype not in allowed:
        raise WeightsError(
            f"{numbers.path}: tensor {module}.weight_scale is {scales.dtype:.40} {reprlib.repr(list(scales.shape))} "
            f"beside {numbers.dtype} {reprlib.repr(list(numbers.shape))}; it must be one of {', '.join(allowed)} for "
            f"all, each row, each {_SQUARE} by {_SQUARE} or each group of inputs: take another checkpoint"
        )
    whole = _scale_of_all(module, scales, entries)
    zeros = entries.get(f"{module}.weight_zero_point")
    if zeros and numbers.dtype == INT and (zeros.dtype != INT or zeros.shape != scales.shape):
        raise WeightsError(
            f"{numbers.path}: tensor {module}.weight_zero_point is {zeros.dtype:.40} "
            f"{reprlib.repr(list(zeros.shape))}; it must be {INT} of the shape of the scales, {list(scales.shape)}: "
            "take another checkpoint"
        )
    words, holds = _kind(numbers.dtype, scales.dtype, each, (rows, inputs), whole is not None)
    if zeros and numbers.dtype == INT and not symmetric:
        words, holds = f"{words} and a zero point", ()
    return ScaledEntry(
        numbers.path, numbers.dtype, (rows, inputs), numbers.start, numbers.end, words, holds,
        scales=scales, each=each, whole=whole, divides=f"{module}.{_DIVIDES}" in entries,
        zeros=zeros if numbers.dtype == INT else None, symmetric=symmetric,
    )  # fmt: skip


def _scale_of_all(module: str, scales: Entry, entries: Mapping[str, Entry]) -> Entry | None:
    found = entries.get(f"{module}.{_DIVIDES}") or entries.get(f"{module}.weight_scale_2")
    if found is not None and (found.dtype != "F32" or found.shape not in ((), (1,))):
        raise WeightsError(
            f"{scales.path}: the scale of all of {module} is {found.dtype:.40} {reprlib.repr(list(found.shape))}; it "
            "must be one F32: take another checkpoint"
        )
    if scales.dtype == E4M3 and found is None:
        raise WeightsError(f"{scales.path}: tensor {module}.weight_scale_2 is missing: fetch all files again")
    return found


def _values_of_a_scale(rows: int, inputs: int, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and inputs that share a scale, None if no such scales have this shape."""
    if shape in ((), (1,), (1, 1)):
        return rows, inputs
    if shape in ((rows,), (rows, 1)):
        return 1, inputs
    squares = (-(-rows // _SQUARE), -(-inputs // _SQUARE))
    if shape in (squares, (squares[0], 1, squares[1], 1)):
        return _SQUARE, _SQUARE
    if len(shape) == 2 and shape[0] == rows and shape[1] and inputs % shape[1] == 0:
        return 1, inputs // shape[1]
    return None


def _kind(
    numbers: str, scales: str, each: tuple[int, int], shape: tuple[int, int], twice: bool
) -> tuple[str, tuple[str, ...]]:
    """How they are published, and the packed formats that hold them exactly."""
    per = "a scale" if each == shape else "a scale for each row" if each == (1, shape[1]) else f"a scale for {each[1]}"
    words = f"{_NAMES[numbers]} with {per}" + (" inputs" if each[1] != shape[1] else "")
    holds = list[str]()
    if twice:
        exact = (numbers, scales, each) == (E2M1, E4M3, (1, nvfp4_format.GROUP))
        return words, ("nvfp4",) if exact else ()
    if numbers == E4M3 and scales in (*FLOATS, *_POWERS) and each in ((_SQUARE, _SQUARE), shape):
        holds.append("fp8")
    if numbers == E4M3 and scales in FLOATS and each == (1, shape[1]):
        holds.append("fp8_row")
    if numbers == INT and scales in FLOATS and each[1] == shape[1]:
        holds.append("int8")
    if numbers == INT and scales in ("F16", "BF16") and each[0] == 1 and each[1] % GROUP == 0:
        holds.append("q8_0")
    if scales in _POWERS:
        holds += ["mxfp4", "bf16"] if numbers == E2M1 and each == (1, GROUP) else ["bf16"]
    return words, tuple(holds)


@dataclass(frozen=True)
class ScaledEntry(MatrixEntry):
    """each: rows and inputs that share a scale. whole: the scale for all, None without one, by which others are divided
    or multiplied. zeros: a zero point beside each scale, which are all 0 if `symmetric`.
    """

    scales: Entry = field(kw_only=True)
    each: tuple[int, int] = field(kw_only=True)
    whole: Entry | None = field(kw_only=True)
    divides: bool = field(kw_only=True)
    zeros: Entry | None = field(kw_only=True)
    symmetric: bool = field(kw_only=True)

    def source(self, name: str, start: int, count: int, step: int) -> Source:
        return ScaledSource(name, self, start, count, step)


@dataclass(frozen=True)
class ScaledSource(Source):
    """Rows of such a matrix. published: the format that they are packed in without loss."""

    entry: ScaledEntry
    published: str | None = None  # type: ignore[misc]

    @property
    def straight(self) -> bool:
        return self.step == 1 and self.start % BLOCK == 0

    def packed_as(self, format: str) -> Source:
        exact = format in self.entry.holds and format != "bf16"
        return replace(self, published=format if exact else None)

    def floats(self, start: int, stop: int) -> Floats:
        rows = (self.start + self.step * np.arange(start, stop)) // self.entry.each[0]
        numbers = self._read(self._row_bytes, start, stop)
        values = _values(self._without_nan(numbers) if self.entry.dtype == E4M3 else numbers, self.entry.dtype)
        if self._zeros is not None:
            values -= self._spread(self._zeros[rows])
        values *= self._spread(self._grid[rows])
        return values

    def blocks(self, start: int, stop: int) -> Bytes:
        numbers, first = self._read(self._row_bytes, start, stop), self.start + start
        if self._zeros is not None and self._zeros.any():
            raise self._refused("has zero points other than 0, and config.json calls its numbers symmetric")
        if self.published == "mxfp4":
            groups = self.columns // GROUP
            return MXFP4.pack_blocks(numbers.reshape(-1, groups, BLOCK), self._powers[first : first + len(numbers)])
        if self.published == "nvfp4":
            fractions = self._fractions[first : first + len(numbers)]
            return NVFP4.pack_blocks(numbers, fractions, np.full(len(numbers), self._factor))
        if self.published == "fp8":
            return FP8.pack_blocks(numbers, self._squares, first)
        scales = np.broadcast_to(self._grid, (self.entry.shape[0], self._grid.shape[1]))[first : first + len(numbers)]
        if self.published == "fp8_row":
            return FP8_ROW.pack_blocks(numbers, scales[:, 0])
        if self.published == "int8":
            return INT8.pack_blocks(numbers.view(np.int8), scales[:, 0])
        try:
            halves = exact_halves(np.repeat(scales, self.entry.each[1] // GROUP, axis=1))
        except ValueError as error:
            raise self._refused(f"cannot be packed in q8_0 as it is: {error}") from None
        return Q8_0.pack_blocks(numbers.view(np.int8), halves)

    def _spread(self, grid: Floats) -> Floats:
        wide: Floats = np.repeat(grid, self.entry.each[1], axis=1)[:, : self.columns]
        return wide

    def _refused(self, reason: str) -> WeightsError:
        return WeightsError(f"{self.entry.path}: tensor {self.name} {reason}: {ROUND}")

    @cached_property
    def _zeros(self) -> Floats | None:
        """Zero points [rows / each, inputs / each]."""
        part, each = self.entry.zeros, self.entry.each
        if part is None:
            return None
        found = read_bytes(part, 0, part.end - part.start).view(np.int8).astype(np.float32)
        return found.reshape(-(-self.entry.shape[0] // each[0]), -1)

    @property
    def _row_bytes(self) -> int:
        return self.columns // 2 if self.entry.dtype == E2M1 else self.columns

    @property
    def _squares(self) -> Floats:
        """A scale for each 128 by 128, though one may be stored for all."""
        shape = tuple(-(-size // _SQUARE) for size in self.entry.shape)
        return np.ascontiguousarray(np.broadcast_to(self._grid, shape))

    @cached_property
    def _powers(self) -> Bytes:
        """Stored exponents of powers of two."""
        exponents = self._stored(np.dtype(np.uint8))
        if (exponents > mxfp4_format.HIGHEST).any():
            raise self._bad_scales()
        return exponents

    @cached_property
    def _fractions(self) -> Bytes:
        """Stored scales in e4m3, which `_factor` multiplies."""
        found = self._stored(np.dtype(np.uint8))
        self._multiplied(found.view(ml_dtypes.float8_e4m3fn))
        return found

    @cached_property
    def _grid(self) -> Floats:
        """The scales, as they multiply numbers: [rows / each, inputs / each]."""
        if self.entry.scales.dtype in _POWERS:
            return mxfp4_format.powers(self._powers)
        return self._multiplied(self._stored(np.dtype(FLOATS.get(self.entry.scales.dtype, ml_dtypes.float8_e4m3fn))))

    def _multiplied(self, stored: Array) -> Floats:
        """Stored scales times the scale of all. Raises WeightsError where they make infinity of the largest number."""
        scales = stored.astype(np.float32)
        if self.entry.whole is not None:
            with np.errstate(all="ignore"):
                scales = scales / self._whole if self.entry.divides else scales * self._whole
        if not (np.abs(scales) <= np.finfo(np.float32).max / np.float32(fp8_format.LARGEST)).all():
            raise self._bad_scales()
        return scales

    @cached_property
    def _whole(self) -> np.float32:
        """The scale of all, as it is stored."""
        assert self.entry.whole is not None
        found: np.float32 = read_bytes(self.entry.whole, 0, 4).view(np.float32)[0]
        return found

    @property
    def _factor(self) -> np.float32:
        """What all scales are multiplied by; of a divisor that is its reciprocal, rounded."""
        return np.float32(1) / self._whole if self.entry.divides else self._whole

    def _stored(self, dtype: np.dtype[Any]) -> Array:
        scales, each = self.entry.scales, self.entry.each
        found: Array = read_bytes(scales, 0, scales.end - scales.start).view(dtype)
        return found.reshape(-(-self.entry.shape[0] // each[0]), -1)


def _values(numbers: Bytes, dtype: str) -> Floats:
    """What the stored numbers are, float32 [rows, inputs]."""
    if dtype == E4M3:
        found: Floats = np.take(fp8_format.VALUES, numbers)
    elif dtype == INT:
        found = numbers.view(np.int8).astype(np.float32)
    else:
        codes = fp4_format.codes_of_pairs(numbers)
        found = np.take(fp4_format.VALUES, codes)
    return found
