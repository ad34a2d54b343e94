"""Single ops on numpy arrays: an executor, the arrays that its ops point at, and steps over them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

import cpu_kernels
from hybrid.program import row_stride

BF16 = ml_dtypes.bfloat16
ISAS = os.environ.get("HYBRID_TEST_ISA", "").split() or cpu_kernels.available_isas()  # those that tests try in turn


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


def padded(rows: np.ndarray) -> np.ndarray:
    """bf16 rows [m, k] as the kernels take them: [m, row_stride(k)], padded with zeros."""
    array = aligned((len(rows), row_stride(rows.shape[1])), BF16)
    array[:, : rows.shape[1]] = rows
    return array


def random_bf16(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(BF16)


class Rig:
    """An executor whose ops take arrays where the bindings take addresses; it keeps those arrays alive."""

    def __init__(
        self, isa: str, threads: int = 1, *, rows: int = 128, slots: int = 4, positions: int = 1024, vocab: int = 256
    ) -> None:
        self.vocab = vocab
        self.executor = cpu_kernels.Executor(
            isa=isa,
            pool=cpu_kernels.ThreadPool(threads, []),
            rows=rows,
            slots=slots,
            positions=positions,
            vocab=vocab,
            scratch_bytes=1 << 20,
        )
        self._arrays: list[dict[str, Any]] = []

    def add(self, op: str, part: str = "other", **arguments: Any) -> None:
        self._arrays.append(arguments)
        addresses = {name: _address(value) for name, value in arguments.items()}
        getattr(self.executor, op)(part=getattr(cpu_kernels.Part, part), **addresses)

    def run(self, rows: int, logit_rows: Iterable[int] = (), tokens: Iterable[int] | None = None) -> np.ndarray:
        """A step of one sequence from its start; returns the logits."""
        return self.step([(0, position) for position in range(rows)], logit_rows, tokens)

    def step(
        self,
        places: Sequence[tuple[int, int]],
        logit_rows: Iterable[int] = (),
        tokens: Iterable[int] | None = None,
    ) -> np.ndarray:
        """A step with a row at each (slot, position); returns the logits."""
        wanted = _ints(logit_rows)
        logits = np.full((len(wanted), self.vocab), np.nan, np.float32)
        slots, positions = (_ints(column) for column in zip(*places, strict=True)) if places else (_ints([]),) * 2
        self.executor.step(_ints(tokens or [0] * len(places)), slots, positions, wanted, logits)
        return logits


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), np.int32)


def _address(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.ctypes.data
    return 0 if value is None else value
