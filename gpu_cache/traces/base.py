"""What a format of traces is, and what readers of several formats share."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpu_cache.errors import CacheError, first_line
from gpu_cache.trace import COLUMNS, MAX_EXPERTS, MAX_LAYERS, NEXT_EXPERT, Ints, Trace, make_trace

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

HEAD = 1 << 16  # bytes that tell what a file is
LONGEST_LINE = 1 << 24
MAX_JSON = 1 << 30  # bytes of a document, which takes ten times as many as objects
MAX_VALUES = 1 << 28  # of what is compressed
_PART = 1 << 16  # rows that are written together

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sizes:
    """MoE layers of a model and experts of a layer, as a user says them; None: what the trace has."""

    layers: int | None = None
    experts: int | None = None


class Source:
    """A file of a trace that is read once, from its beginning on, so that it may be a pipe. name: for errors."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self.head = _read_head(file)
        self._file = io.BufferedReader(_Rejoined(self.head, file), HEAD)

    @cached_property
    def whole(self) -> bytes:
        return self._file.read()

    @property
    def stream(self) -> BinaryIO:
        """From the beginning on, once."""
        return io.BytesIO(self.whole) if "whole" in self.__dict__ else self._file

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not blank, from 1 on, without their ends. Raises CacheError for one that has no end."""
        stream = self.stream
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), start=1):
            if len(line) == LONGEST_LINE:
                raise CacheError(f"{self.name}: line {number} has more than {LONGEST_LINE} bytes; give a whole trace")
            if text := line.decode("utf-8-sig" if number == 1 else "utf-8", "replace").strip():
                yield number, text

    @property
    def line(self) -> bytes:
        """The first line, without a byte order mark and blanks; empty if it is longer than the head."""
        line, ended, _ = self.head.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
        return line.strip() if ended or len(self.head) < HEAD else b""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Of parquet; none for other files, and where parquet cannot be read."""
        if not self.head.startswith(b"PAR1"):
            return ()
        try:
            import pyarrow.parquet

            return tuple(pyarrow.parquet.read_schema(io.BytesIO(self.whole)).names)
        except Exception:  # not installed, or damaged in one of many ways: the reader says so
            return ()

    @property
    def is_json(self) -> bool:
        return self.head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")

    @cached_property
    def documents(self) -> list[Any]:
        """Its JSON: one document, the members of a list, or a document a line; none if it is no JSON.

        Raises CacheError for more than can be held.
        """
        if not self.is_json:
            return []
        if len(self.whole) > MAX_JSON:
            raise CacheError(
                f"{self.name}: has {len(self.whole) / 1e6:,.0f} MB of JSON, {MAX_JSON / 1e6:,.0f} are read"
            )
        try:
            found = json.loads(self.whole)
        except (ValueError, RecursionError):
            found = _lines_of_json(self.whole)
        return found if isinstance(found, list) else [found]


def _read_head(file: BinaryIO) -> bytes:
    """A pipe gives it in pieces."""
    head = b""
    while len(head) < HEAD and (piece := file.read(HEAD - len(head))):
        head += piece
    return head


def _lines_of_json(text: bytes) -> list[Any]:
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return []


@contextmanager
def archive_errors(name: str, kind: str) -> Iterator[None]:
    """A damaged ZIP makes `zipfile` raise many kinds; each is a CacheError of one line. kind: of the file, in words."""
    try:
        yield
    except CacheError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        OSError,
        EOFError,
        ValueError,
        LookupError,
        RuntimeError,
    ) as error:
        raise CacheError(f"{name}: is no whole {kind} ({first_line(error)[:160]}); copy it again") from None


class _Rejoined(io.RawIOBase):
    """What was read of a file already, and then the rest of it."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        piece = self._head.read(len(memoryview(buffer))) or self._rest.read(len(memoryview(buffer)))
        memoryview(buffer)[: len(piece)] = piece
        return len(piece)


@dataclass(frozen=True)
class TraceFormat:
    """A kind of file that traces are in.

    name: as `--to` spells it. about: who writes it. suffix: by which `--to` may be left out, "" for none. lacks: what
    it cannot hold, in words; "" if it holds everything. fits: whether a file is of it, by its content.
    read: raises CacheError with the place of what is wrong; None: it is only written.
    write: may raise CacheError, before the first byte, for what the format cannot hold; None: it is only read.
    """

    name: str
    about: str
    suffix: str
    lacks: str
    fits: Callable[[Source], bool]
    read: Callable[[Source, Sizes], Trace] | None = None
    write: Callable[[BinaryIO, Trace, Progress], None] | None = None


class Rows:
    """Collects the rows of a trace, token by token and layer by layer; 48 bytes a token and layer, 12 an expert.

    unit: what a place is counted in, as "line".
    """

    def __init__(self, name: str, sizes: Sizes, unit: str = "line") -> None:
        self._name, self._sizes, self._unit = name, sizes, unit
        self._tokens, self._experts, self._scores = array("q"), array("q"), array("f")
        self._allowed = sizes.experts or MAX_EXPERTS

    def __len__(self) -> int:
        return len(self._experts)

    def add(
        self,
        at: int,
        step: int,
        sequence: int,
        position: int,
        layer: int,
        experts: Sequence[int],
        scores: Sequence[float] | None = None,
    ) -> None:
        """The experts of a token at a layer, best first; scores: all equal if they are not known.

        at: the place, for errors. layer: as the file counts them. Raises CacheError for what is no expert.
        """
        try:
            self._experts.extend(array("q", experts))
            self._scores.extend(array("f", [1 / len(experts)] * len(experts) if scores is None else scores))
            self._tokens.extend((step, sequence, position, layer, len(experts)))
        except (TypeError, OverflowError) as error:
            raise self.refuse(at, f"has what is no number of an expert or no score ({first_line(error)})") from None
        if len(self._scores) != len(self._experts):
            raise self.refuse(at, f"has {len(experts)} experts and {len(scores or ())} scores")
        if experts and not 0 <= min(experts) <= max(experts) < self._allowed:
            wrong = next(expert for expert in experts if not 0 <= expert < self._allowed)
            raise self.refuse(at, f"has the unknown expert {wrong}; allowed: 0 to {self._allowed - 1}")
        if not 0 <= layer < MAX_LAYERS:
            raise self.refuse(at, f"has the unknown layer {layer}; allowed: 0 to {MAX_LAYERS - 1}")

    def refuse(self, at: int, problem: str) -> CacheError:
        return CacheError(f"{self._name}: {self._unit} {at} {problem}")

    def trace(self, experts: int | None = None, layers: int | None = None) -> Trace:
        """The trace, its layers counted among those that occur, from 0. experts, layers: as the file says them.

        Raises CacheError if there are no rows.
        """
        table = np.frombuffer(self._tokens, np.int64).reshape(-1, 5)
        counts = table[:, 4]
        start = np.cumsum(counts) - counts
        columns = {
            name: np.repeat(table[:, at], counts) for at, name in enumerate(("step", "sequence", "position", "layer"))
        }
        columns["rank"] = np.arange(len(self._experts)) - np.repeat(start, counts)
        columns["expert"] = np.frombuffer(self._experts, np.int64)
        scores = np.frombuffer(self._scores, np.float32)
        return finish({**columns, "score": scores}, self._sizes, self._name, experts, layers)


def finish(
    columns: dict[str, NDArray[Any]], sizes: Sizes, name: str, experts: int | None = None, layers: int | None = None
) -> Trace:
    """A trace of columns whose rows may be in any order of steps and whose layers are those of the model, dense ones
    too: they are counted among those that occur. What the user says beats what the file says.
    """
    step = columns["step"]
    if (step[1:] < step[:-1]).any():
        order = np.argsort(step, kind="stable")
        columns = {name: column[order] for name, column in columns.items()}
    occurring, columns["layer"] = np.unique(columns["layer"], return_inverse=True)
    if layers is not None and len(occurring) > layers:
        layers = None
    return make_trace(columns, sizes.layers or layers, sizes.experts or experts, name)


def routed(columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Without the rows whose expert is -1, by which several formats say that nothing was routed, or not here."""
    kept = columns["expert"] != -1
    return columns if kept.all() else {name: column[kept] for name, column in columns.items()}


def passes_of(layer: Ints, sequence: Ints | None = None) -> Ints:
    """Numbers the passes through a model of rows in the order in which they are computed, layer by layer: a layer
    before the last one begins a new pass, as does another sequence, where they are known and computed one by one.
    """
    begins = np.diff(layer, prepend=layer[:1]) < 0
    if sequence is not None:
        begins |= np.diff(sequence, prepend=sequence[:1]) != 0
    return np.cumsum(begins)


def parts(trace: Trace, progress: Progress) -> Iterator[slice]:
    """Slices of the rows of a trace, a bounded number in each."""
    for first in range(0, len(trace), _PART):
        yield slice(first, min(first + _PART, len(trace)))
        progress(min(first + _PART, len(trace)), len(trace))


@dataclass(frozen=True)
class Choice:
    """What a token chose at a layer: its experts, best first, and their scores."""

    step: int
    sequence: int
    position: int
    layer: int
    experts: list[int]
    scores: list[float]


def choices(trace: Trace, progress: Progress) -> Iterator[Choice]:
    """Every token at every layer, in the order of the trace."""
    begins = begin_of_choices(trace)
    ends = np.append(begins[1:], len(trace))
    for first in range(0, len(begins), _PART):
        part = slice(first, min(first + _PART, len(begins)))
        about = np.stack([trace.step, trace.sequence, trace.position, trace.layer])[:, begins[part]].T.tolist()
        for row, begin, end in zip(about, begins[part].tolist(), ends[part].tolist(), strict=True):
            step, sequence, position, layer = row
            experts, scores = trace.expert[begin:end].tolist(), trace.score[begin:end].tolist()
            yield Choice(step, sequence, position, layer, experts, scores)
        progress(int(ends[part][-1]), len(trace))


def begin_of_choices(trace: Trace) -> Ints:
    """The first row of every token at a layer."""
    place = np.stack([trace.step, trace.sequence, trace.position, trace.layer])
    changed = (place[:, 1:] != place[:, :-1]).any(axis=0)
    return np.concatenate([[0], np.flatnonzero(changed) + 1]).astype(np.int64)


def check_width(trace: Trace, name: str) -> None:
    """Raise CacheError unless every token has as many experts, for a format that says them in columns."""
    counts = np.diff(np.append(begin_of_choices(trace), len(trace)))
    if (counts != counts[0]).any():
        raise CacheError(
            f"{name} has as many experts for every token; this trace has {counts.min()} to {counts.max()}; choose "
            "another format"
        )


def by_sequence(trace: Trace) -> Trace:
    """The same rows sequence by sequence, in the order in which they begin, for formats that know one at a time. A step
    that several share becomes one of each.
    """
    _, first, number = np.unique(trace.sequence, return_index=True, return_inverse=True)
    turn = np.argsort(np.argsort(first))[number]
    order = np.argsort(turn, kind="stable")
    columns = {name: getattr(trace, name)[order] for name in COLUMNS}
    if trace.next_expert is not None:
        columns[NEXT_EXPERT] = trace.next_expert[order]
    turn, step = turn[order], columns["step"]
    changed = (np.diff(turn, prepend=turn[:1]) != 0) | (np.diff(step, prepend=step[:1]) != 0)
    return replace(trace, **columns | {"step": np.cumsum(changed)})


def is_prompt(trace: Trace) -> NDArray[np.bool_]:
    """Whether the token of a row was computed in one step with others of its sequence, as tokens of prompts are."""
    names, number = np.unique(trace.sequence, return_inverse=True)
    _, part = np.unique(trace.step * len(names) + number, return_inverse=True)
    order = np.argsort(part, kind="stable")
    begins = np.flatnonzero(np.diff(part[order], prepend=-1))
    position = trace.position[order]
    together = np.minimum.reduceat(position, begins) != np.maximum.reduceat(position, begins)
    return np.asarray(together[part], bool)
