"""`expert_choices.csv` of the CPU-GPU collaborative inference of arXiv 2512.16473."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.trace import COLUMNS, Trace
from gpu_cache.traces.base import Progress, Rows, Sizes, Source, TraceFormat, by_sequence, check_width, parts

NAME = "expert_choices.csv"  # its programs look for this
_LARGEST = 1 << 31


def _fits(source: Source) -> bool:
    return source.line.startswith(b"Index,")


def _read(source: Source, sizes: Sizes) -> Trace:
    """Rows are tokens: a number, then the expert ids of every layer, as many columns as the model has experts a token
    (Block_0, Block_0, Block_1, ...), ascending, so that the order of ranks and the scores are lost. The row of a prompt
    is empty; behind it begins another sequence.
    """
    lines = source.lines()
    _, header = next(lines, (0, ""))
    names = [name.strip() for name in header.split(",")[1:]]
    blocks = list(dict.fromkeys(names))
    top_k = len(names) // len(blocks) if blocks else 0
    if not top_k or names != [block for block in blocks for _ in range(top_k)]:
        raise CacheError(f"{source.name}: is no {NAME}; its columns are Index, then each Block_i once per expert")
    rows = Rows(source.name, sizes)
    step = sequence = position = 0
    for number, line in lines:
        cells = [cell.strip() for cell in line.split(",")[1:]]
        if not any(cells):
            sequence += position > 0
            position = 0
            continue
        if len(cells) != len(names):
            raise rows.refuse(number, f"has {len(cells)} experts, the header {len(names)}; give a whole file")
        experts = [_expert(cell, rows, number) for cell in cells]
        for layer in range(len(blocks)):
            rows.add(number, step, sequence, position, layer, experts[layer * top_k : (layer + 1) * top_k])
        step, position = step + 1, position + 1
    return rows.trace()


def _expert(cell: str, rows: Rows, number: int) -> int:
    """Its programs write 12.0, too."""
    try:
        expert = float(cell)
        if expert.is_integer() and abs(expert) < _LARGEST:
            return int(expert)
    except ValueError:
        pass
    raise rows.refuse(number, f"has a cell that is no expert number, {cell[:20]!r}; give a whole file")


class ChoicesSink:
    """Writes rows as they come, a line for a step of one token. A step of several, as of a prompt, is an empty line,
    and so is where another sequence goes on, which that program could not compute together.

    Raises CacheError where tokens have not all as many experts and layers as the first.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rest: NDArray[np.int64] = np.empty((len(COLUMNS) - 1, 0), np.int64)  # the step that may go on
        self._shape: tuple[int, int] | None = None  # layers, experts of a token
        self._lines, self._sequence = 0, -1

    def write(self, integers: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """integers: [columns without the score, rows]. scores: not kept."""
        rows = np.concatenate([self._rest, integers], axis=1)
        begins = np.flatnonzero(np.diff(rows[0], prepend=rows[0, 0] - 1))
        self._file.write("".join(self._line(part) for part in np.split(rows, begins[1:], axis=1)[:-1]).encode())
        self._rest = rows[:, begins[-1] :]

    def close(self) -> None:
        """The last step is whole, unless something ended the run in the middle of it."""
        if self._rest.shape[1] and self._is_whole(self._rest):
            self._file.write(self._line(self._rest).encode())

    def abandon(self) -> None:
        """Nothing is held but the file."""

    def _is_whole(self, rows: NDArray[np.int64]) -> bool:
        return self._shape is None or rows.shape[1] >= self._shape[0] * self._shape[1]

    def _line(self, rows: NDArray[np.int64]) -> str:
        """Of a step."""
        step, sequence, position, layer, rank, expert = rows
        layers, top_k = int(layer.max()) + 1, int(rank.max()) + 1
        text = ""
        if self._shape is None:
            self._shape = layers, top_k
            text = ",".join(["Index", *(f"Block_{at}" for at in range(layers) for _ in range(top_k))]) + "\n"
        token = np.unique(rows[1:3], axis=1)
        if token.shape[1] > 1:
            self._sequence = int(sequence[-1]) if (sequence == sequence[0]).all() else -1
            return text + self._numbered([])
        if sequence[0] != self._sequence and self._lines:
            text += self._numbered([])
        self._sequence = int(sequence[0])
        if (layers, top_k) != self._shape or rows.shape[1] != layers * top_k:
            raise CacheError(
                f"step {step[0]} has {rows.shape[1]} experts, a line of {NAME} {self._shape[0]} layers of "
                f"{self._shape[1]}; choose another format"
            )
        return text + self._numbered(np.sort(expert.reshape(layers, top_k), axis=1).reshape(-1).tolist())

    def _numbered(self, experts: list[int]) -> str:
        assert self._shape is not None
        cells: list[Any] = experts or [""] * (self._shape[0] * self._shape[1])
        self._lines += 1
        return ",".join(map(str, [self._lines - 1, *cells])) + "\n"


def _write(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    check_width(trace, "expert-choices")
    sink = ChoicesSink(file)
    for integers, scores in _blocks(by_sequence(trace), progress):
        sink.write(integers, scores)
    sink.close()


def _blocks(trace: Trace, progress: Progress) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    for part in parts(trace, progress):
        yield np.array([getattr(trace, name)[part] for name in COLUMNS[:-1]]), trace.score[part]


FORMATS = (
    TraceFormat(
        "expert-choices",
        f"{NAME} of the collaborative inference of arXiv 2512.16473",
        "",
        "ranks, scores and prompts",
        _fits,
        _read,
        _write,
    ),
)
