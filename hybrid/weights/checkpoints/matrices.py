"""Matrices of a checkpoint, read by rows: as floats, or as the blocks that it publishes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hybrid.errors import WeightsError
from hybrid.formats import FP8, MXFP4
from hybrid.formats import fp8 as fp8_format
from hybrid.formats import mxfp4 as mxfp4_format
from hybrid.formats.block import BLOCK, GROUP, Array, Bytes, Floats
from hybrid.weights.shard import Entry, read_bytes

FLOATS: dict[str, npt.DTypeLike] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
INTEGERS: dict[str, npt.DTypeLike] = {"I32": np.int32, "I64": np.int64}  # of tables of small numbers
TABLES = (".tid2eid",)  # what their names end with
_LARGEST_SCALE = np.finfo(np.float32).max / np.float32(fp8_format.LARGEST)
FP8_DTYPE, MXFP4_DTYPE = "F8_E4M3", "U8"


@dataclass(frozen=True)
class Source:
    """`count` rows of a tensor of floats seen as [-1, columns]: row `start` and each `step`-th after it.

    published: the format in which the rows are stored, or None for plain floats.
    """

    name: str
    entry: Entry
    start: int
    count: int
    step: int = 1

    published: ClassVar[str | None] = None

    @property
    def columns(self) -> int:
        return self.entry.shape[-1] if self.entry.shape else 1

    @property
    def straight(self) -> bool:
        """Whether any whole blocks of rows can be taken as they are published."""
        return False

    def packed_as(self, format: str) -> Source:
        """The same rows, to be packed in this format."""
        return self

    def floats(self, start: int, stop: int) -> Array:
        """Rows [stop - start, columns], in the dtype of the checkpoint, or dequantised as float32."""
        dtype = np.dtype((FLOATS | INTEGERS)[self.entry.dtype])
        values = self._read(self.columns * dtype.itemsize, start, stop).view(dtype)
        return values.astype(np.float32) if self.entry.dtype in INTEGERS else values

    def blocks(self, start: int, stop: int) -> Bytes:
        """The same rows packed in the published format without quantising them again; start is a multiple of 16."""
        raise NotImplementedError

    def _read(self, row_bytes: int, start: int, stop: int) -> Bytes:
        first, last = self.start + start * self.step, self.start + (stop - 1) * self.step + 1
        rows: Bytes = read_bytes(self.entry, first * row_bytes, last * row_bytes).reshape(-1, row_bytes)
        return np.ascontiguousarray(rows[:: self.step])

    def _without_nan(self, codes: Bytes) -> Bytes:
        """The same e4m3 codes: what is opened is looked at here, because bf16 would hold a NaN."""
        if fp8_format.has_nan(codes):
            raise WeightsError(
                f"{self.entry.path}: tensor {self.name} holds NaN, weights must be finite: take another checkpoint"
            )
        return codes

    def _bad_scales(self) -> WeightsError:
        return WeightsError(
            f"{self.entry.path}: the scales of tensor {self.name} hold NaN or infinity, or make its values infinite: "
            "take another checkpoint"
        )


@dataclass(frozen=True)
class TransposedSource(Source):
    """Rows of matrices that a tensor of floats [..., columns, rows] holds transposed.

    What is asked for lies scattered all over a matrix, so that is read whole the first time and its rows are kept.
    """

    @property
    def columns(self) -> int:
        return self.entry.shape[-2]

    def floats(self, start: int, stop: int) -> Array:
        return self._rows[start:stop]

    @cached_property
    def _rows(self) -> Array:
        (columns, rows), dtype = self.entry.shape[-2:], np.dtype(FLOATS[self.entry.dtype])
        matrix, first = divmod(self.start, rows)
        size = columns * rows * dtype.itemsize
        whole = read_bytes(self.entry, matrix * size, (matrix + 1) * size).view(dtype).reshape(columns, rows)
        return np.ascontiguousarray(whole[:, first : first + self.count * self.step : self.step].T)


@dataclass(frozen=True)
class TurnedSource(Source):
    """The columns of another source as rows. It is read whole the first time: keep it small."""

    rows: Source = field(kw_only=True)

    @classmethod
    def of(cls, rows: Source) -> Source:
        """What was turned is as it was when it is turned again."""
        if isinstance(rows, TurnedSource):
            return rows.rows
        return cls(rows.name, rows.entry, 0, rows.columns, rows=rows)

    @property
    def columns(self) -> int:
        return self.rows.count

    def floats(self, start: int, stop: int) -> Array:
        return self._turned[start:stop]

    @cached_property
    def _turned(self) -> Array:
        return np.ascontiguousarray(self.rows.floats(0, self.rows.count).T)


@dataclass(frozen=True)
class Fp8Source(Source):
    """Rows of e4m3 values with a scale for each 128 by 128 of them, in a tensor [..., rows / 128, columns / 128]."""

    scales: Entry = field(kw_only=True)

    published: ClassVar[str | None] = "fp8"

    @property
    def straight(self) -> bool:
        return self.step == 1 and self._first % BLOCK == 0

    def floats(self, start: int, stop: int) -> Floats:
        rows = self._first + self.step * np.arange(start, stop)
        codes = self._without_nan(self._read(self.columns, start, stop))
        return fp8_format.decode(codes, self._grid[rows // fp8_format.SQUARE])

    def blocks(self, start: int, stop: int) -> Bytes:
        return FP8.pack_blocks(self._read(self.columns, start, stop), self._grid, self._first + start)

    @property
    def _first(self) -> int:
        """Row `start` within its own matrix, of the many that a tensor of fused experts holds."""
        return self.start % self.entry.shape[-2]

    @cached_property
    def _grid(self) -> Floats:
        """Scales of the whole matrix, [rows / 128, columns / 128]."""
        shape, dtype = self.scales.shape[-2:], np.dtype(FLOATS[self.scales.dtype])
        size, matrix = shape[0] * shape[1] * dtype.itemsize, self.start // self.entry.shape[-2]
        stored: npt.NDArray[Any] = read_bytes(self.scales, matrix * size, (matrix + 1) * size).view(dtype)
        grid = stored.astype(np.float32)
        if not (np.abs(grid) <= _LARGEST_SCALE).all():
            raise self._bad_scales()
        return grid.reshape(shape)


@dataclass(frozen=True)
class Mxfp4Source(Source):
    """Rows of mxfp4 blocks, in a tensor [..., columns / 32, 16] of two codes a byte, and their exponents."""

    scales: Entry = field(kw_only=True)

    published: ClassVar[str | None] = "mxfp4"

    @property
    def columns(self) -> int:
        return self.entry.shape[-2] * GROUP

    @property
    def straight(self) -> bool:
        return True

    def floats(self, start: int, stop: int) -> Floats:
        return mxfp4_format.decode(*self._blocks_and_scales(start, stop))

    def blocks(self, start: int, stop: int) -> Bytes:
        return MXFP4.pack_blocks(*self._blocks_and_scales(start, stop))

    def _blocks_and_scales(self, start: int, stop: int) -> tuple[Bytes, Bytes]:
        groups = self.entry.shape[-2]
        codes = self._read(groups * 16, start, stop).reshape(-1, groups, 16)
        exponents = Source(self.name, self.scales, self.start, self.count, self.step)._read(groups, start, stop)
        if (exponents > mxfp4_format.HIGHEST).any():
            raise self._bad_scales()
        return codes, exponents
