"""Traces from and to the files of other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import Calls, Trace, make_trace

LIBCACHESIM_COLUMNS = ("time", "object", "size")
CHOICES_BEGIN = b"Index,"  # of expert_choices.csv


def from_expert_choices(file: BinaryIO, name: str, layers: int | None = None, experts: int | None = None) -> Trace:
    """Read `expert_choices.csv` of the CPU-GPU collaborative inference of arXiv 2512.16473.

    Its rows are tokens of one sequence: a number, then the expert ids of every layer, as many columns as the model has
    experts a token (Block_0, Block_0, Block_1, ...), ascending: the order of ranks and the gate scores are lost, so
    all scores are equal. Rows of a prompt are empty and skipped. name: for errors. Raises CacheError.
    """
    rows = _rows(file, name)
    names = [column.strip() for column in next(rows, [])[1:]]
    blocks = list(dict.fromkeys(names))
    top_k = len(names) // len(blocks) if blocks else 0
    if not top_k or names != [block for block in blocks for _ in range(top_k)]:
        raise CacheError(f"{name}: is no expert_choices.csv; its columns are Index, then each Block_i once per expert")
    table = _choices(name, rows, len(names)).reshape(-1, len(blocks), top_k)
    step, layer, rank = np.indices(table.shape).reshape(3, -1)
    score = np.full(table.size, 1 / top_k, np.float32)
    columns = {"step": step, "sequence": np.zeros_like(step), "position": step, "layer": layer, "rank": rank}
    return make_trace({**columns, "expert": table.reshape(-1), "score": score}, layers, experts, name)


def _rows(file: BinaryIO, name: str) -> Iterator[list[str]]:
    """The cells of every line."""
    try:
        yield from csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline=""))
    except csv.Error as error:
        raise CacheError(f"{name}: is no CSV ({error}); convert a whole file") from None


def _choices(name: str, rows: Iterator[list[str]], width: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Rows of expert ids; lines without any are left out."""
    chosen: list[list[int]] = []
    for number, row in enumerate(rows, start=2):
        cells = [cell.strip() for cell in row[1:]]
        if not any(cells):
            continue
        if len(cells) != width:
            raise CacheError(
                f"{name}: line {number} has {len(cells)} experts, the header {width}; convert a whole file"
            )
        try:
            chosen.append([_expert(cell) for cell in cells])
        except (ValueError, OverflowError):
            raise CacheError(
                f"{name}: line {number} has a cell that is no expert number; convert a whole file"
            ) from None
    return np.array(chosen, np.int64).reshape(-1, width)


def _expert(cell: str) -> int:
    """Its programs write 12.0, too."""
    number = int(float(cell))
    if not -1 <= number <= 1 << 31:
        raise ValueError
    return number


def to_libcachesim(calls: Calls, file: BinaryIO) -> None:
    """Write calls as the CSV of libCacheSim: time (the group's number), object (the key) and size 1.

    Read it there with `time-col=1, obj-id-col=2, obj-size-col=3, has-header=true, delimiter=,`. It has no sets, no
    groups and no scores: such a replay equals ours only for a fully associative cache and one call a group.
    """
    group = np.repeat(np.arange(len(calls)), np.diff(calls.start))
    lines = map("%d,%d,1\n".__mod__, zip(group.tolist(), calls.key.tolist(), strict=True))
    file.writelines(map(str.encode, chain([",".join(LIBCACHESIM_COLUMNS) + "\n"], lines)))
