"""Traces of routing: which experts each token chose in each layer, and the calls of the cache that follow."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError

COLUMNS = ("step", "sequence", "position", "layer", "rank", "expert", "score")
NEXT_EXPERT = "next_expert"  # a column that a trace may have beside them
MAX_LAYERS, MAX_EXPERTS = 1 << 10, 1 << 13  # several times what any model has; a simulator keeps tables of both
_MAX_STEP = 1 << 40
_MAX_ROWS = 1 << 28  # of parquet, whose rows may take next to no bytes
_LONGEST_LINE = 1 << 16  # bytes
_PARQUET = b"PAR1"
_GROUPS_AT_A_TIME = 1 << 15  # turned into Python lists together
_LARGEST_COMPARED = 16  # calls of a group that are compared in pairs, without sorting

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Trace:
    """One row for each expert of each token at each MoE layer; rows in order of step, token and rank.

    Columns are equally long arrays. step, sequence, position, layer, rank, expert: int64; score: float32, the gate's.
    layers, experts: MoE layers of the model and routed experts of a layer; `key` = layer * experts + expert.
    next_expert: int64, the expert of this rank that the next MoE layer's router names for what this layer reads, -1
    where it was not asked; None for a trace that does not say so.
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
    next_expert: Ints | None = None

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, eq=False)
class Calls:
    """The calls of a trace: distinct experts of each (step, layer), a group, in order of first appearance.

    step, sequence, layer: one value a group; sequence: of the first token that asked. Calls of group g are
    expert[start[g] : start[g + 1]] and the same part of score, which holds the largest gate score among the tokens that
    asked. Iterating gives (step, layer, experts, scores). named: the same groups, of the experts that the next layer's
    router names early, where the trace says so; those that are none of the model mean that no router was asked.
    teacher: calls that rules of prefetch learn from instead of these.
    """

    step: Ints
    sequence: Ints
    layer: Ints
    start: Ints
    expert: Ints
    score: Floats
    layers: int
    experts: int
    named: Calls | None = None
    teacher: Calls | None = None

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
    def named_share(self) -> float:
        """Share of the groups before the last layer where the trace says what the next layer's router names."""
        before = self.layer + 1 < self.layers
        if self.named is None or not before.any():
            return float(self.named is not None)
        said = np.maximum.reduceat(self.named.expert < self.experts, self.named.start[:-1])
        return float(said[before].mean())

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
        if self.named is not None:
            name.update(self.named.digest().encode())
        if self.teacher is not None:
            name.update(f"taught by {self.teacher.digest()}".encode())
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
    return Calls(step, sequence[start], layer, ends, expert, score, trace.layers, trace.experts, _named(trace))


def _named(trace: Trace) -> Calls | None:
    if trace.next_expert is None:
        return None
    named = np.where(trace.next_expert < 0, trace.experts, trace.next_expert)
    return calls(replace(trace, expert=named, experts=trace.experts + 1, next_expert=None))


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
    data = {column: np.asarray(columns[column], _type_of(column)) for column in COLUMNS}
    named = np.asarray(columns[NEXT_EXPERT], np.int64) if NEXT_EXPERT in columns else None
    if not len(data["step"]):
        raise CacheError(f"{where}: holds no rows; record at least one step")
    for column, limit in (("layer", layers or MAX_LAYERS), ("expert", experts or MAX_EXPERTS), ("step", _MAX_STEP)):
        wrong = (data[column] < 0) | (data[column] >= limit)
        _refuse(where, wrong, data[column], f"unknown {column}", f"allowed: 0 to {limit - 1}")
    if named is not None:
        limit = experts or MAX_EXPERTS
        _refuse(where, (named < -1) | (named >= limit), named, f"unknown {NEXT_EXPERT}", f"allowed: -1 to {limit - 1}")
    largest = max(int(column.max()) for column in (data["expert"], named) if column is not None)
    layers, experts = layers or int(data["layer"].max()) + 1, experts or largest + 1
    unsorted = np.diff(data["step"], prepend=0) < 0
    _refuse(where, unsorted, data["step"], "unsorted step", "steps must not descend; sort the rows by step")
    _refuse(where, ~np.isfinite(data["score"]), data["score"], "bad score", "it must be a finite number")
    return Trace(**data, layers=layers, experts=experts, next_expert=named)


def _refuse(where: str, wrong: NDArray[np.bool_], values: NDArray[Any], what: str, cure: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise CacheError(f"{where}: row {row + 1} has the {what} {values[row]}; {cure}")


def read_trace(file: BinaryIO, name: str, layers: int | None = None, experts: int | None = None) -> Trace:
    """Read CSV or parquet with the columns of a trace, and `next_expert`; others are ignored. file: read once, from its
    beginning on, so that it may be a pipe. name: for errors. Raises CacheError.
    """
    begin = file.read(len(_PARQUET))
    columns = _read_parquet(file, begin, name) if begin == _PARQUET else _read_csv(file, begin, name)
    return make_trace(columns, layers, experts, name)


def _read_csv(file: BinaryIO, begin: bytes, name: str) -> dict[str, Any]:
    first = begin if b"\n" in begin else begin + file.readline(_LONGEST_LINE)
    if not first:
        raise CacheError(f"{name}: is empty; record it again, or give another file")
    header = [column.strip() for column in first.decode("utf-8-sig", "replace").split(",")]
    _check_columns(name, header)
    columns = _columns_of(header)
    picked = [header.index(column) for column in columns]
    row = np.dtype([(column, _type_of(column)) for column in columns])
    rows = load_rows(iter(lambda: file.readline(_LONGEST_LINE), b""), name, row, picked)
    return {column: rows[column] for column in columns}


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
            columns = _columns_of(opened.schema_arrow.names)
            table = opened.read(columns=columns)
        if any(table[column].null_count for column in columns):
            raise ValueError("it has empty cells")
        return {column: table[column].to_numpy().astype(_type_of(column), casting="same_kind") for column in columns}
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


def _columns_of(found: Sequence[str]) -> list[str]:
    """The columns that are read of those that a file has."""
    return [*COLUMNS, *([NEXT_EXPERT] if NEXT_EXPERT in found else [])]


def _type_of(column: str) -> np.dtype[Any]:
    return np.dtype(np.float32 if column == "score" else np.int64)


def _check_columns(name: str, found: list[str]) -> None:
    missing = [column for column in COLUMNS if column not in found]
    if missing:
        raise CacheError(
            f"{name}: has no column {', '.join(missing)}; a trace has {','.join(COLUMNS)}, or is of "
            "another format that `hybrid trace formats` lists"
        )
    twice = [column for column in (*COLUMNS, NEXT_EXPERT) if found.count(column) > 1]
    if twice:
        raise CacheError(f"{name}: has the column {', '.join(twice)} twice; a trace has {','.join(COLUMNS)}")


def _damaged(name: str, error: Exception) -> CacheError:
    return CacheError(f"{name}: is not a whole trace ({' '.join(str(error).split())[:160]}); record it again")
