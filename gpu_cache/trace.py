"""Traces of routing: which experts each token chose in each layer, and the calls of the cache that follow."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError

COLUMNS = ("step", "sequence", "position", "layer", "rank", "expert", "score")
MAX_LAYERS, MAX_EXPERTS = 1 << 10, 1 << 13  # several times what any model has; a simulator keeps tables of both
_MAX_STEP = 1 << 40
_MAX_ROWS = 1 << 28  # of parquet, whose rows may take next to no bytes
_LONGEST_LINE = 1 << 16  # bytes
_PARQUET = b"PAR1"
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


@dataclass(frozen=True, eq=False)
class Calls:
    """The calls of a trace: distinct experts of each (step, layer), a group, in order of first appearance.

    step, sequence, layer: one value a group; sequence: of the first token that asked. Calls of group g are
    expert[start[g] : start[g + 1]] and the same part of score, which holds the largest gate score among the tokens that
    asked. Iterating gives (step, layer, experts, scores).
    """

    step: Ints
    sequence: Ints
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
        return int(self.sizes.max())

    @property
    def sizes(self) -> Ints:
        """Number of calls of every group."""
        return np.diff(self.start)

    @property
    def layer_of_call(self) -> Ints:
        return np.repeat(self.layer, self.sizes)

    def by_layer(self, values: Ints) -> Ints:
        """int64 [layers]: the sum of one value a group over the groups of every layer."""
        return np.bincount(self.layer, weights=values, minlength=self.layers).astype(np.int64)

    @property
    def key(self) -> Ints:
        """The key of every call."""
        return self.layer_of_call * self.experts + self.expert

    def __iter__(self) -> Iterator[tuple[int, int, list[int], list[float]]]:
        for steps, layers, ends, _, experts, scores in self.in_lists():
            begin = 0
            for step, layer, end in zip(steps, layers, ends, strict=True):
                yield step, layer, experts[begin:end], scores[begin:end]
                begin = end

    def in_lists(self) -> Iterator[tuple[list[int], list[int], list[int], list[int], list[int], list[float]]]:
        """Many groups at a time, as Python's lists: step, layer and end of each group; key, expert and score of each
        call. A group's calls begin where those of the group before end, the first one's at 0.
        """
        for first in range(0, len(self), _GROUPS_AT_A_TIME):
            last = min(first + _GROUPS_AT_A_TIME, len(self))
            origin, end = int(self.start[first]), int(self.start[last])
            ends, layers, expert = (
                self.start[first + 1 : last + 1] - origin,
                self.layer[first:last],
                self.expert[origin:end],
            )
            keys = np.repeat(layers * self.experts, self.sizes[first:last]) + expert
            columns = (self.step[first:last], layers, ends, keys, expert)
            steps, layers_, ends_, keys_, experts = (column.tolist() for column in columns)
            yield steps, layers_, ends_, keys_, experts, self.score[origin:end].tolist()

    def digest(self) -> str:
        """A name for exactly these calls: 16 hexadecimal digits."""
        name = hashlib.sha256(f"{self.layers} {self.experts}".encode())
        for column in (self.step, self.sequence, self.layer, self.start, self.expert, self.score):
            name.update(np.ascontiguousarray(column).data)
        return name.hexdigest()[:16]


def calls(trace: Trace) -> Calls:
    """Group the rows of a trace by (step, layer), each expert once. Layers of a step may come in any order."""
    place = trace.step * trace.layers + trace.layer
    sequence, expert, score = trace.sequence, trace.expert, trace.score
    if (place[1:] < place[:-1]).any():
        order = np.argsort(place, kind="stable")
        place, sequence, expert, score = place[order], sequence[order], expert[order], score[order]
    group = np.concatenate([[0], np.cumsum(place[1:] != place[:-1])])
    call = group * trace.experts + expert
    if _repeats(call, group):
        kept, score = _distinct(call, score)
        place, group, sequence, expert = place[kept], group[kept], sequence[kept], expert[kept]
    start = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1])
    step, layer = np.divmod(place[start], trace.layers)
    ends = np.append(start, len(group))
    return Calls(step, sequence[start], layer, ends, expert, score, trace.layers, trace.experts)


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
    """Check columns and put them into a `Trace`. layers, experts: of the model; None: what the largest number implies.

    Raises CacheError naming the first row that is wrong, counted from 1.
    """
    where = name or "trace"
    for what, given, maximum in (("layers", layers, MAX_LAYERS), ("experts", experts, MAX_EXPERTS)):
        if given is not None and not 1 <= given <= maximum:
            raise CacheError(f"{where}: {given} {what} are no model's; allowed: 1 to {maximum}")
    data = {column: np.asarray(columns[column], _ROW[column]) for column in COLUMNS}
    if not len(data["step"]):
        raise CacheError(f"{where}: holds no rows; record at least one step")
    for column, limit in (("layer", layers or MAX_LAYERS), ("expert", experts or MAX_EXPERTS), ("step", _MAX_STEP)):
        wrong = (data[column] < 0) | (data[column] >= limit)
        _refuse(where, wrong, data[column], f"unknown {column}", f"allowed: 0 to {limit - 1}")
    layers, experts = layers or int(data["layer"].max()) + 1, experts or int(data["expert"].max()) + 1
    unsorted = np.diff(data["step"], prepend=0) < 0
    _refuse(where, unsorted, data["step"], "unsorted step", "steps must not descend; sort the rows by step")
    _refuse(where, ~np.isfinite(data["score"]), data["score"], "bad score", "it must be a finite number")
    return Trace(**data, layers=layers, experts=experts)


def _refuse(where: str, wrong: NDArray[np.bool_], values: NDArray[Any], what: str, cure: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise CacheError(f"{where}: row {row + 1} has the {what} {values[row]}; {cure}")


def read_trace(file: BinaryIO, name: str, layers: int | None = None, experts: int | None = None) -> Trace:
    """Read CSV or parquet with the columns of a trace; others are ignored. file: read once, from its beginning on, so
    that it may be a pipe. name: for errors. Raises CacheError.
    """
    begin = file.read(len(_PARQUET))
    columns = _read_parquet(file, begin, name) if begin == _PARQUET else _read_csv(file, begin, name)
    return make_trace(columns, layers, experts, name)


def _read_csv(file: BinaryIO, begin: bytes, name: str) -> dict[str, Any]:
    first = begin if b"\n" in begin else begin + file.readline(_LONGEST_LINE)
    header = [column.strip() for column in first.decode("utf-8-sig", "replace").split(",")]
    _check_columns(name, header)
    picked = [header.index(column) for column in COLUMNS]
    rows = load_rows(iter(lambda: file.readline(_LONGEST_LINE), b""), name, _ROW, picked)
    return {column: rows[column] for column in COLUMNS}


def load_rows(
    lines: Iterator[bytes], name: str, dtype: np.dtype[Any], columns: Sequence[int] | None = None
) -> NDArray[Any]:
    """Numbers with commas between them; lines that begin with # are left out. columns: those that are read, None: all.

    Raises CacheError for what is no number of that type.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no rows, which are refused
            warnings.simplefilter("error", DeprecationWarning)  # numpy before 2.3 reads 0.5 or 10^20 as a whole number
            return np.loadtxt(lines, dtype, delimiter=",", usecols=columns, ndmin=1, encoding="utf-8")
    except (ValueError, OverflowError, DeprecationWarning) as error:
        raise _damaged(name, error) from None


def _read_parquet(file: BinaryIO, begin: bytes, name: str) -> dict[str, Any]:
    parquet = import_parquet()
    from pyarrow import BufferReader

    source = BufferReader(begin + file.read())  # it reads the end first
    try:
        with parquet.ParquetFile(source) as opened:
            _check_columns(name, opened.schema_arrow.names)
            if not 0 <= opened.metadata.num_rows <= _MAX_ROWS:
                raise ValueError(f"it has {opened.metadata.num_rows} rows, {_MAX_ROWS} are allowed")
            table = opened.read(columns=list(COLUMNS))
        if any(table[column].null_count for column in COLUMNS):
            raise ValueError("it has empty cells")
        return {column: table[column].to_numpy().astype(_ROW[column], casting="same_kind") for column in COLUMNS}
    except CacheError:
        raise
    except Exception as error:  # a damaged file makes pyarrow raise many kinds
        raise _damaged(name, error) from None


def import_parquet() -> Any:
    """The module that reads and writes parquet. Raises CacheError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise CacheError(
            "parquet needs pyarrow, which is not installed: pip install 'hybrid-moe[research]', or use CSV"
        ) from None
    return pyarrow.parquet


def _check_columns(name: str, found: list[str]) -> None:
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        raise CacheError(
            f"{name}: has no column {', '.join(missing)}; a trace has {','.join(COLUMNS)}, or is of "
            "another format that `hybrid trace formats` lists"
        )
    twice = [column for column in COLUMNS if found.count(column) > 1]
    if twice:
        raise CacheError(f"{name}: has the column {', '.join(twice)} twice; a trace has {','.join(COLUMNS)}")


def _damaged(name: str, error: Exception) -> CacheError:
    return CacheError(f"{name}: is not a whole trace ({' '.join(str(error).split())[:160]}); record it again")
