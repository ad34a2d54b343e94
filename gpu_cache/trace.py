"""Traces of routing: which experts each token chose in each layer, and the calls of the cache that follow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError

COLUMNS = ("step", "sequence", "position", "layer", "rank", "expert", "score")
SUFFIXES = (".csv", ".parquet")
_ROW = np.dtype([(name, "f4" if name == "score" else "i8") for name in COLUMNS])
_GROUPS_AT_A_TIME = 1 << 15  # turned into Python lists together
_LARGEST_COMPARED = 16  # calls of a group that are compared in pairs, without sorting

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Trace:
    """One row for each expert of each token at each MoE layer; rows in order of step, token and rank.

    Columns are equally long arrays. step, sequence, position, layer, rank, expert: int64; score: float32, the gate's.
    layers, experts: MoE layers of the model and routed experts of a layer; `key` = layer * experts + expert.
    """

    step: Ints
    sequence: Ints
    position: Ints
    layer: Ints
    rank: Ints
    expert: Ints
    score: Floats
    layers: int
    experts: int

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Calls:
    """The calls of a trace: distinct experts of each (step, layer), a group, in order of first appearance.

    step, layer: one value a group. Calls of group g are expert[start[g] : start[g + 1]] and the same part of score,
    which holds the largest gate score among the tokens that asked. Iterating gives (step, layer, experts, scores).
    """

    step: Ints
    layer: Ints
    start: Ints
    expert: Ints
    score: Floats
    layers: int
    experts: int

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.step)

    @property
    def total(self) -> int:
        """Number of calls."""
        return len(self.expert)

    @property
    def steps(self) -> int:
        """Number of different steps."""
        return int(np.count_nonzero(np.diff(self.step))) + (len(self) > 0)

    @property
    def largest(self) -> int:
        """Calls of the largest group."""
        return int(np.diff(self.start).max())

    @property
    def layer_of_call(self) -> Ints:
        return np.repeat(self.layer, np.diff(self.start))

    @property
    def key(self) -> Ints:
        """The key of every call."""
        return self.layer_of_call * self.experts + self.expert

    def __iter__(self) -> Iterator[tuple[int, int, list[int], list[float]]]:
        for first in range(0, len(self), _GROUPS_AT_A_TIME):
            last = min(first + _GROUPS_AT_A_TIME, len(self))
            origin, end = int(self.start[first]), int(self.start[last])
            experts, scores = self.expert[origin:end].tolist(), self.score[origin:end].tolist()
            bounds = pairwise((self.start[first : last + 1] - origin).tolist())
            groups = zip(self.step[first:last].tolist(), self.layer[first:last].tolist(), bounds, strict=True)
            for step, layer, (a, b) in groups:
                yield step, layer, experts[a:b], scores[a:b]

    def digest(self) -> str:
        """A name for exactly these calls: 16 hexadecimal digits."""
        name = hashlib.sha256(f"{self.layers} {self.experts}".encode())
        for column in (self.step, self.layer, self.start, self.expert, self.score):
            name.update(np.ascontiguousarray(column).data)
        return name.hexdigest()[:16]


def calls(trace: Trace) -> Calls:
    """Group the rows of a trace by (step, layer), each expert once. Layers of a step may come in any order."""
    place = trace.step * trace.layers + trace.layer
    expert, score = trace.expert, trace.score
    if (place[1:] < place[:-1]).any():
        order = np.argsort(place, kind="stable")
        place, expert, score = place[order], expert[order], score[order]
    group = np.concatenate([[0], np.cumsum(place[1:] != place[:-1])])
    call = group * trace.experts + expert
    if _repeats(call, group):
        kept, score = _distinct(call, score)
        place, group, expert = place[kept], group[kept], expert[kept]
    start = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1])
    step, layer = np.divmod(place[start], trace.layers)
    return Calls(step, layer, np.append(start, len(group)), expert, score, trace.layers, trace.experts)


def _repeats(call: Ints, group: Ints) -> bool:
    """Whether a group names an expert twice, or is too large to find out cheaply."""
    largest = int(np.bincount(group).max())
    return largest > _LARGEST_COMPARED or any((call[lag:] == call[:-lag]).any() for lag in range(1, largest))


def _distinct(call: Ints, score: Floats) -> tuple[Ints, Floats]:
    """Rows where each call appears first, ascending, and its largest score."""
    order = np.argsort(call, kind="stable")
    first = np.flatnonzero(np.diff(call[order], prepend=-1))
    largest = np.maximum.reduceat(score[order], first)
    back = np.argsort(order[first])
    return order[first][back], largest[back]


def make_trace(columns: dict[str, Any], layers: int | None = None, experts: int | None = None, name: str = "") -> Trace:
    """Check columns and put them into a `Trace`. layers, experts: of the model; None: the largest that occurs.

    Raises CacheError naming the first row that is wrong, counted from 1.
    """
    where = name or "trace"
    data = {column: np.asarray(columns[column], _ROW[column]) for column in COLUMNS}
    if not len(data["step"]):
        raise CacheError(f"{where}: holds no rows; record at least one step")
    layers = int(data["layer"].max()) + 1 if layers is None else layers
    experts = int(data["expert"].max()) + 1 if experts is None else experts
    for column, limit in (("layer", layers), ("expert", experts), ("step", 1 << 40)):
        wrong = (data[column] < 0) | (data[column] >= limit)
        _refuse(where, wrong, data[column], f"unknown {column}", f"allowed: 0 to {limit - 1}")
    unsorted = np.diff(data["step"], prepend=0) < 0
    _refuse(where, unsorted, data["step"], "unsorted step", "steps must not descend; sort the rows by step")
    _refuse(where, ~np.isfinite(data["score"]), data["score"], "bad score", "it must be a finite number")
    return Trace(**data, layers=layers, experts=experts)


def _refuse(where: str, wrong: NDArray[np.bool_], values: NDArray[Any], what: str, cure: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise CacheError(f"{where}: row {row + 1} has the {what} {values[row]}; {cure}")


def read_trace(path: Path, layers: int | None = None, experts: int | None = None) -> Trace:
    """Read a CSV or parquet file with the columns of a trace; others are ignored. Raises CacheError."""
    check_suffix(path)
    if not path.is_file():
        raise CacheError(f"{path}: there is no such file; `hybrid run --trace FILE` records one")
    columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    return make_trace(columns, layers, experts, str(path))


def check_suffix(path: Path) -> None:
    """Raise CacheError unless the name ends as a trace does, and what reads it is installed."""
    if path.suffix not in SUFFIXES:
        raise CacheError(f"{path}: a trace ends in {' or '.join(SUFFIXES)}; name it so")
    if path.suffix == ".parquet":
        parquet()


def _read_csv(path: Path) -> dict[str, Any]:
    with open(path, encoding="utf-8", errors="replace") as file:
        header = [name.strip() for name in file.readline().split(",")]
        _check_columns(path, header)
        if not file.readline():
            return dict.fromkeys(COLUMNS, ())
    picked = [header.index(name) for name in COLUMNS]
    try:
        rows = np.loadtxt(path, _ROW, delimiter=",", skiprows=1, usecols=picked, ndmin=1, encoding="utf-8")
    except (ValueError, OverflowError) as error:
        raise _damaged(path, error) from None
    return {name: rows[name] for name in COLUMNS}


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        with parquet().ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            table = file.read(columns=list(COLUMNS))
        if any(table[name].null_count for name in COLUMNS):
            raise ValueError("it has empty cells")
        return {name: table[name].to_numpy().astype(_ROW[name], casting="same_kind") for name in COLUMNS}
    except CacheError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise _damaged(path, error) from None


def parquet() -> Any:
    """The module that reads and writes parquet. Raises CacheError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise CacheError(
            "parquet needs pyarrow, which is not installed: pip install 'hybrid-moe[research]', or name a .csv file"
        ) from None
    return pyarrow.parquet


def _check_columns(path: Path, names: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise CacheError(f"{path}: has no column {', '.join(missing)}; a trace has {','.join(COLUMNS)}")


def _damaged(path: Path, error: Exception) -> CacheError:
    return CacheError(f"{path}: is not a whole trace ({' '.join(str(error).split())[:160]}); record it again")
