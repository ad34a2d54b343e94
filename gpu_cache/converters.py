"""Traces from and to the files of other programs."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import Calls, Trace, make_trace


def from_expert_choices(path: Path, layers: int | None = None, experts: int | None = None) -> Trace:
    """Read `expert_choices.csv` of the CPU-GPU collaborative inference of arXiv 2512.16473.

    Its rows are tokens of one sequence: a number, then the expert ids of every layer, as many columns as the model has
    experts a token (Block_0, Block_0, Block_1, ...), ascending: the order of ranks and the gate scores are lost, so
    all scores are equal. Rows of a prompt are empty and skipped. Raises CacheError.
    """
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    names = [name.strip() for name in header[1:]]
    blocks = list(dict.fromkeys(names))
    top_k = len(names) // len(blocks) if blocks else 0
    if not top_k or names != [name for name in blocks for _ in range(top_k)]:
        raise CacheError(f"{path}: is no expert_choices.csv; its columns are Index, then each Block_i once per expert")
    table = _choices(path, rows, len(names)).reshape(-1, len(blocks), top_k)
    step, layer, rank = np.indices(table.shape).reshape(3, -1)
    score = np.full(table.size, 1 / top_k, np.float32)
    columns = {"step": step, "sequence": np.zeros_like(step), "position": step, "layer": layer, "rank": rank}
    return make_trace({**columns, "expert": table.reshape(-1), "score": score}, layers, experts, str(path))


def _choices(path: Path, rows: list[list[str]], width: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Rows of expert ids; lines without any are left out."""
    chosen: list[list[int]] = []
    for number, row in enumerate(rows, start=2):
        cells = [cell.strip() for cell in row[1:]]
        if not any(cells):
            continue
        try:
            chosen.append([int(float(cell)) for cell in cells])
        except (ValueError, OverflowError):
            raise CacheError(
                f"{path}: line {number} has a cell that is no expert number; convert a whole file"
            ) from None
        if len(cells) != width:
            raise CacheError(
                f"{path}: line {number} has {len(cells)} experts, the header {width}; convert a whole file"
            )
    return np.array(chosen, np.int64).reshape(-1, width)


def to_libcachesim(calls: Calls, path: Path) -> None:
    """Write calls as the CSV of libCacheSim: time (the group's number), object (the key) and size 1.

    Read it there with `time-col=1, obj-id-col=2, obj-size-col=3, has-header=true, delimiter=,`. It has no sets, no
    groups and no scores: such a replay equals ours only for a fully associative cache and one call a group.
    """
    group = np.repeat(np.arange(len(calls)), np.diff(calls.start))
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="ascii") as file:
            file.write("time,object,size\n")
            file.writelines(map("%d,%d,1\n".__mod__, zip(group.tolist(), calls.key.tolist(), strict=True)))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_expert_choices(path: Path) -> bool:
    """Whether a file begins as `expert_choices.csv` does."""
    if path.suffix != ".csv" or not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().lstrip().startswith("Index,")
