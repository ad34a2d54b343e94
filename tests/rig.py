"""Single ops on numpy arrays: an executor, the arrays that its ops point at, and steps over them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

import cpu_kernels
from hybrid.formats import FORMATS, GROUPED
from hybrid.formats.block import K_ALIGN, round_up

BF16 = ml_dtypes.bfloat16
SUM_INPUTS, SCALE_INPUTS = 32, 256  # inputs that share a sum and a scale in an int8 activation row
GROUP_INPUTS = 32  # those that share a scale and a sum in a grouped one
# Formats of which matrix tiles, where there are any, multiply other operands: from so many rows of a product on.
OTHER_ON_TILES = {"mxfp4": 7, "int4": 17} | dict.fromkeys(GROUPED, 16)
ISAS = os.environ.get("HYBRID_TEST_ISA", "").split() or cpu_kernels.available_isas()  # those that tests try in turn


def paired(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every combination of the values of these axes, each with one instruction set behind it, in turn: every value of
    an axis meets every instruction set, if the other axis has as many values as there are instruction sets.
    """
    return [
        (*(value for _, value in chosen), ISAS[sum(number for number, _ in chosen) % len(ISAS)])
        for chosen in itertools.product(*(list(enumerate(axis)) for axis in axes))
    ]


# Formats that tests of kernels try: of codes in groups those in which each length and each kind of scales occurs.
VARIED = ("q8_0", "q5_1", "q4_k", "q6_k")
TRIED = [name for name in FORMATS if name not in GROUPED or name in VARIED]


def aligned(shape: int | Sequence[int], dtype: Any, fill: float = 0) -> np.ndarray:
    """An array that starts on a cache line, as everything in a plan does."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + size].view(dtype).reshape(shape)
    array[...] = fill
    return array


def placed(array: np.ndarray) -> np.ndarray:
    """An aligned copy."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def row_stride(width: int) -> int:
    """Elements from row to row: inputs are padded with zeros to what packed matrices expect."""
    return round_up(width, K_ALIGN)


def padded(rows: np.ndarray) -> np.ndarray:
    """bf16 rows [m, k] as the kernels take them: [m, row_stride(k)], padded with zeros."""
    array = aligned((len(rows), row_stride(rows.shape[1])), BF16)
    array[:, : rows.shape[1]] = rows
    return array


def int8_row_parts(width: int) -> tuple[slice, slice, slice]:
    """Where the values, sums and scales of an int8 activation row of `width` inputs lie, in bytes."""
    values = row_stride(width)
    sums = values + values // SUM_INPUTS * 4
    return slice(values), slice(values, sums), slice(sums, sums + -(-values // SCALE_INPUTS) * 4)


def grouped_row_parts(width: int) -> tuple[slice, slice]:
    """Where the values of a grouped activation row of `width` inputs lie, and the scale and the sums of each group."""
    values = row_stride(width)
    return slice(values), slice(values, values + values // GROUP_INPUTS * 16)


def wide_row_parts(width: int) -> tuple[slice, slice, slice, slice, slice]:
    """Where a wide activation row of `width` inputs has its bf16 values, upper bytes, lower bytes, sums and scales."""
    k = row_stride(width)
    sizes = 2 * k, k, k, k // SUM_INPUTS * 8, -(-k // SCALE_INPUTS) * 4
    ends = np.cumsum(sizes).tolist()
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))


def bf16_row_parts(width: int) -> tuple[slice]:
    """Where the values of a row of bf16 lie, in bytes."""
    return (slice(2 * row_stride(width)),)


PARTS = {"bf16": bf16_row_parts, "int8": int8_row_parts, "grouped": grouped_row_parts, "wide": wide_row_parts}


def used_bytes(width: int, kind: str) -> int:
    """Bytes of an activation row of whole numbers, of one of the kinds."""
    return PARTS[kind](width)[-1].stop


def quantised_row_bytes(width: int, kind: str) -> int:
    """Bytes from one such row to the next."""
    return round_up(used_bytes(width, kind), 64)


def int8_rows(x: np.ndarray) -> np.ndarray:
    """Rows [m, k] as int8 activation rows, bytes [m, quantised_row_bytes(k, "int8")], by the definition."""
    values, sums, scales = int8_row_parts(x.shape[1])
    units, steps = _units(x, SCALE_INPUTS)
    rows = aligned((len(x), quantised_row_bytes(x.shape[1], "int8")), np.uint8)
    rows[:, values] = units.view(np.uint8)
    rows[:, sums] = units.reshape(len(x), -1, SUM_INPUTS).sum(-1, dtype=np.int32).view(np.uint8)
    rows[:, scales] = steps.view(np.uint8)
    return rows


def grouped_rows(x: np.ndarray) -> np.ndarray:
    """Rows [m, k] as grouped activation rows, bytes [m, quantised_row_bytes(k, "grouped")], by the definition."""
    values, groups = grouped_row_parts(x.shape[1])
    units, steps = _units(x, GROUP_INPUTS)
    halves = units.reshape(len(x), -1, 2, GROUP_INPUTS // 2).sum(-1, dtype=np.float32)
    sums = np.stack([halves.sum(-1), *np.moveaxis(halves, -1, 0)], axis=-1)
    rows = aligned((len(x), quantised_row_bytes(x.shape[1], "grouped")), np.uint8)
    rows[:, values] = units.view(np.uint8)
    rows[:, groups] = (steps[..., None] * np.insert(sums, 0, 1, axis=-1)).reshape(len(x), -1).view(np.uint8)
    return rows


def wide_rows(x: np.ndarray) -> np.ndarray:
    """Rows [m, k] as wide activation rows, bytes [m, quantised_row_bytes(k, "wide")], by the definition."""
    values, high, low, sums, scales = wide_row_parts(x.shape[1])
    units, steps = _units(x, SCALE_INPUTS, 10943, np.int16, powers=True)
    upper = np.rint(units / 128).astype(np.int8)
    halves = units.reshape(len(x), -1, 2, SUM_INPUTS // 2).sum(-1, dtype=np.int32)
    rows = aligned((len(x), quantised_row_bytes(x.shape[1], "wide")), np.uint8)
    rows[:, values] = padded(x.astype(BF16)).view(np.uint8)
    rows[:, high] = upper.view(np.uint8)
    rows[:, low] = (units - 128 * upper.astype(np.int16)).astype(np.int8).view(np.uint8)
    rows[:, sums] = (-12 * halves.cumsum(-1, dtype=np.int32)).reshape(len(x), -1).view(np.uint8)
    rows[:, scales] = steps.view(np.uint8)
    return rows


def _units(
    x: np.ndarray, together: int, top: int = 127, dtype: Any = np.int8, powers: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [m, k] as whole numbers up to `top` [m, row_stride(k)], and the float32 scales of each `together` of them,
    the next powers of two if asked for.
    """
    m, k = x.shape
    stride = row_stride(k)
    groups = np.zeros((m, round_up(stride, together)), np.float32)
    groups[:, :k] = x
    groups = groups.reshape(m, -1, together)
    largest = np.abs(groups).max(-1, keepdims=True)
    finite = largest >= top / np.finfo(np.float32).max  # else the factor would not be, and all are as good as zero
    steps = largest / np.float32(top)
    if powers:
        fraction, exponent = np.frexp(steps)
        powers = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
        steps = np.where(steps == 0, steps, np.maximum(powers, np.finfo(np.float32).tiny))
        factor, finite = np.zeros_like(steps), largest > np.float32(2e-34)
        np.divide(np.float32(1), steps, out=factor, where=finite)
    else:
        factor = np.divide(np.float32(top), largest, out=np.zeros_like(largest), where=finite)
    units = np.rint(groups * factor).reshape(m, -1)[:, :stride].astype(dtype)
    return units, np.ascontiguousarray(steps[..., 0])


def quantised_rows(kind: str, x: np.ndarray) -> np.ndarray:
    """Rows [m, k] as activation rows of whole numbers of one of the kinds, by the definition."""
    return {"int8": int8_rows, "grouped": grouped_rows, "wide": wide_rows}[kind](x)


def rows_of(format: str, x: np.ndarray) -> np.ndarray:
    """The left operand for weights of a format: x [m, k] as bf16 or as activation rows of int8."""
    kind = FORMATS[format].rows
    return padded(x.astype(BF16)) if kind == "bf16" else quantised_rows(kind, x)


def empty_rows(format: str, count: int, width: int) -> np.ndarray:
    """Room for activation rows of int8, for an op to write what products with weights of this format read."""
    return aligned((count, quantised_row_bytes(width, FORMATS[format].rows)), np.uint8)


def row_steps(rows: np.ndarray, width: int, kind: str) -> np.ndarray:
    """The scale of every value of activation rows of int8: float32 [m, width]."""
    *_, at = PARTS[kind](width)
    found = np.ascontiguousarray(rows[:, at]).view(np.float32)
    if kind != "grouped":
        return found.repeat(SCALE_INPUTS, axis=1)[:, :width]
    return found[:, ::4].repeat(GROUP_INPUTS, axis=1)[:, :width]


def other_on_tiles(isa: str, format: str, rows: int) -> bool:
    """Whether a product of so many rows multiplies other operands on matrix tiles than elsewhere: bytes of int4 rounded
    once more (`kernel_reference`), or bf16 where rows are wide or grouped."""
    return isa == "amx" and rows >= OTHER_ON_TILES.get(format, rows + 1)


def dequantised_rows(format: str, rows: np.ndarray, width: int, tiles: bool = False) -> np.ndarray:
    """What a left operand stands for, exactly: float64 [m, width]. tiles: where `other_on_tiles`."""
    kind = FORMATS[format].rows
    if kind == "bf16":
        return rows[:, :width].astype(np.float64)
    if tiles and kind == "wide":
        return np.ascontiguousarray(rows[:, wide_row_parts(width)[0]]).view(BF16)[:, :width].astype(np.float64)
    values = whole_numbers(rows, width, kind) * row_steps(rows, width, kind)
    return (values.astype(BF16) if tiles and kind == "grouped" else values).astype(np.float64)


def whole_numbers(rows: np.ndarray, width: int, kind: str) -> np.ndarray:
    """The values of activation rows of whole numbers before they are scaled: int32 [m, width]."""
    if kind != "wide":
        return rows[:, :width].view(np.int8).astype(np.int32)
    _, high, low, *_ = wide_row_parts(width)
    upper, lower = (np.ascontiguousarray(rows[:, part]).view(np.int8).astype(np.int32) for part in (high, low))
    return (128 * upper + lower)[:, :width]


def quantise_kind(kind: str) -> dict[str, bool]:
    """The arguments of the `quantise` op that say which rows it writes."""
    return {"grouped": kind == "grouped", "wide": kind == "wide"}


def packed(format: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W [n, k] as the kernels take it, and what that stands for, float32 [n, k]."""
    blocks = placed(FORMATS[format].pack(weight))
    return blocks, FORMATS[format].unpack(blocks, *weight.shape)


def format_of(format: str) -> cpu_kernels.Format:
    return getattr(cpu_kernels.Format, format)


def random_bf16(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(BF16)


class Rig:
    """An executor whose ops take arrays where the bindings take addresses; it keeps those arrays alive.

    It has the scratch that its ops are said to need for steps of `rows` rows, and not a line more. What is written
    behind that ends the process, if there is one thread.
    """

    def __init__(
        self,
        isa: str,
        threads: int = 1,
        *,
        nodes: int = 1,
        rows: int = 128,
        sequences: int = 4,
        positions: int = 1024,
        vocab: int = 256,
        batch_invariant: bool = False,
    ) -> None:
        self.vocab, self._isa, self._rows = vocab, isa, rows
        self._new_executor = partial(
            cpu_kernels.Executor,
            isa=isa,
            pool=cpu_kernels.ThreadPool(threads, [], nodes),
            rows=rows,
            sequences=sequences,
            positions=positions,
            vocab=vocab,
            batch_invariant=batch_invariant,
        )
        self._scratch = 0
        self.executor = self._new_executor(scratch_bytes=0)
        self._ops: list[tuple[str, dict[str, Any]]] = []
        self._arrays: list[dict[str, Any]] = []

    def add(self, op: str, part: str = "other", **arguments: Any) -> None:
        addresses = self.addresses(arguments)
        self._grow(cpu_kernels.scratch_bytes(op, self._isa, self._rows, **addresses))
        self._ops.append((op, {"part": getattr(cpu_kernels.Part, part), **addresses}))
        self._bind(self._ops[-1])

    def _grow(self, scratch: int) -> None:
        if scratch <= self._scratch:
            return
        self._scratch = scratch
        self.executor = self._new_executor(scratch_bytes=scratch)
        for op in self._ops:
            self._bind(op)

    def _bind(self, op: tuple[str, dict[str, Any]]) -> None:
        getattr(self.executor, op[0])(**op[1])

    def addresses(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same with addresses for arrays, which live as long as this."""
        self._arrays.append(arguments)
        return {name: _address(value) for name, value in arguments.items()}

    def run(self, rows: int, logit_rows: Iterable[int] = (), tokens: Iterable[int] | None = None) -> np.ndarray:
        """A step of one sequence from its start; returns the logits."""
        return self.step([(0, position) for position in range(rows)], logit_rows, tokens)

    def step(
        self,
        places: Sequence[tuple[int, int]],
        logit_rows: Iterable[int] = (),
        tokens: Iterable[int] | None = None,
    ) -> np.ndarray:
        """A step with a row at each (sequence, position); returns the logits."""
        wanted = _ints(logit_rows)
        logits = np.full((len(wanted), self.vocab), np.nan, np.float32)
        sequences, positions = (_ints(column) for column in zip(*places, strict=True)) if places else (_ints([]),) * 2
        self.executor.step(_ints(tokens or [0] * len(places)), sequences, positions, wanted, logits)
        return logits


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), np.int32)


def _address(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    return 0 if value is None else value
