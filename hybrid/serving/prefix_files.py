"""Kept prompts on disk, between starts: a file for the tokens of a node, checked before anything of it is used.

A file is named by what it begins after and what it ends with, holds the checksum of all it says, and gets its name once
it is whole. So a process that is killed, a disk that is full and a file that is damaged cost what they would have saved
and nothing else. A folder below the one that is given belongs to one model with one set of settings.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import accumulate
from math import inf
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hybrid.errors import HybridError
from hybrid.files import FolderLock, Reading, atomic_file, input_file
from hybrid.formats.block import BLOCK, round_up
from hybrid.serving.kept import Tokens, common_tokens

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

SUFFIX = ".prefix"
VERSION = 1
MAX_PENDING = 256 << 20  # bytes that wait to be written; what comes beyond is not
FIRST_REST, LONGEST_REST = 10.0, 600.0  # seconds without a try to write, after one that failed
_HEADER_BYTES = 4096
_READING = Reading(1 << 40, "it is not used", streams=False)
_UNSOUND = (HybridError, ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError, MemoryError)
_logger = logging.getLogger("hybrid.prefixes")


@dataclass(frozen=True)
class Part:
    """What a file holds: `tokens` behind those whose digest is `start`, their keys and values, and the state after
    them, which may have no bytes.
    """

    start: str
    end: str
    tokens: Tokens
    keys: npt.NDArray[np.uint8]
    state: npt.NDArray[np.uint8]

    @property
    def body(self) -> tuple[npt.NDArray[np.uint8], ...]:
        """What a file has behind its header."""
        return self.tokens.astype("<i4").view(np.uint8), self.keys, self.state

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.body)


@dataclass(frozen=True)
class Entry:
    """A file that may be read. tokens: as its header says, before they were checked."""

    path: Path
    start: str
    end: str
    tokens: Tokens
    keys: int
    state: int

    @property
    def nbytes(self) -> int:
        return _HEADER_BYTES + self.tokens.nbytes + self.keys + self.state


def digest(tokens: Tokens, phase: int) -> str:
    """Identifies the beginning of a prompt, of one phase."""
    return digests(tokens, [len(tokens)], phase)[0]


def digests(tokens: Tokens, ends: Sequence[int], phase: int) -> list[str]:
    """Those of the beginnings that have so many tokens, ascending."""
    found, start, names = blake2b(b"%d " % phase, digest_size=16), 0, list[str]()
    for end in ends:
        found.update(np.ascontiguousarray(tokens[start:end], "<i4").tobytes())
        names.append(found.copy().hexdigest())
        start = end
    return names


def open_files(engine: Engine) -> PrefixFiles | None:
    """Those that an engine's settings ask for; raises as `PrefixFiles` does."""
    plan = engine.plan
    if plan.prefix_dir is None:
        return None
    sizes = (plan.prefix_disk_bytes, plan.kv.token_bytes, plan.kv.fixed_bytes)
    return PrefixFiles(plan.prefix_dir, prefix_mark(engine), *sizes)


def prefix_mark(engine: Engine) -> str:
    """Identifies what keys, values and states depend on: the weights, how they are computed, and their layout."""
    from hybrid import __version__

    plan, tokens = engine.plan, engine.plan.kv.tokens
    computed = (__version__, plan.isa, plan.batch_invariant, plan.device_name, plan.cache is not None, plan.kv.format)
    layers = [(layer.binding, layer.token_bytes, layer.nbytes - tokens * layer.token_bytes) for layer in plan.kv.layers]
    return sha256(json.dumps([engine.store.content, *computed, layers]).encode()).hexdigest()


class PrefixFiles:
    """The files of one model and its settings, at most `limit` bytes of them; what was used longest ago is removed.

    Any thread may ask and read; one of its own writes, which ends with `close`. token_bytes, state_bytes: sizes of what
    a file may hold. Raises as `FolderLock` does.
    """

    def __init__(self, folder: Path, mark: str, limit: int, token_bytes: int, state_bytes: int) -> None:
        self._folder, self._limit, self._mark = folder / mark[:16], limit, mark
        self._token_bytes, self._state_bytes = token_bytes, state_bytes
        self._held = FolderLock(
            self._folder, f"--prefix-dir {folder}"
        )  # for its owner alone: somebody said what it holds
        self._lock = threading.Lock()
        self._entries: OrderedDict[Path, Entry] = OrderedDict()  # the longest unused first
        self._starts: dict[str, list[Entry]] = {}
        self._nbytes = self._pending = 0
        self._rests_until = 0.0  # nothing is taken before; the disk was full
        self._rest = FIRST_REST
        self._unsure = 0  # bytes to be written without a failure before the disk counts as sound again
        self._queue: SimpleQueue[tuple[list[Entry], list[Part]] | threading.Event | None] = SimpleQueue()
        self._queued: set[Path] = set()  # files that are to be written
        self._index()
        self._thread = threading.Thread(target=self._write_all, name="hybrid-prefixes", daemon=True)
        self._thread.start()

    def after(self, start: str) -> list[Entry]:
        """Files that hold tokens behind a beginning."""
        with self._lock:
            return list(self._starts.get(start, ()))

    def longest(self, tokens: Tokens, start: int, phase: int) -> Entry | None:
        """The file that goes on longest with what follows the first `start` tokens: a block at least, or all it has."""
        shared = [
            (common_tokens(entry.tokens, tokens[start:]), entry) for entry in self.after(digest(tokens[:start], phase))
        ]
        usable = [(count, entry) for count, entry in shared if count >= min(BLOCK, len(entry.tokens))]
        return max(usable, key=lambda item: item[0])[1] if usable else None

    def read(self, entry: Entry, keys: npt.NDArray[np.uint8] | None = None) -> Part | None:
        """What a file holds; None, and a line of a warning, if it is damaged, which removes it. keys: uint8
        [entry.keys], the memory that keys and values are read to.
        """
        keys = np.empty(entry.keys, np.uint8) if keys is None else keys
        try:
            with input_file(entry.path, _READING) as file:
                header, tokens = self._header(file), file.read(entry.tokens.nbytes)
                size = len(tokens) + file.readinto(keys.data)
                state = file.read(entry.state)
                if size + len(state) != entry.nbytes - _HEADER_BYTES or file.read(1):
                    raise ValueError("its length is wrong")
            part = Part(entry.start, entry.end, _tokens_of(tokens), keys, np.frombuffer(state, np.uint8))
            if header["checksum"] != self._checksum(part) or not np.array_equal(part.tokens, entry.tokens):
                raise ValueError("its checksum is wrong")
        except _UNSOUND as error:
            if self._forget(entry):  # or it gave way while it was read
                _logger.warning("%s is not used and was removed: %s", entry.path, " ".join(str(error).split()))
            return None
        return part

    def write(self, fresh: Sequence[Part], known: Sequence[Part] = ()) -> None:
        """Have what is fresh written soon, and what comes before it where it has no file, from the beginning on as much
        as may wait; the rest when it is known. The files that known parts have are used now.
        """
        with self._lock:
            paths = [self._path(part) for part in known]
            used = [self._entries[path] for path in paths if path in self._entries]
            there = self._entries.keys() | self._queued
            wanted = [part for part, path in zip(known, paths, strict=True) if path not in there] + [*fresh]
            sizes = accumulate(part.nbytes for part in wanted)
            count = sum(self._pending + size <= MAX_PENDING for size in sizes)
            taken = [] if monotonic() < self._rests_until else wanted[: count or not self._pending]
            self._pending += sum(part.nbytes for part in taken)
            self._queued.update(map(self._path, taken))
        if used or taken:
            self._queue.put((used, taken))

    def flush(self) -> None:
        """Wait until what was to be written is."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()
        self._held.release()

    def abandon(self) -> None:
        """Leave the folder to another owner, because whoever uses these files does not end: none is used, written or
        removed from now on, but for one that is being written. Any thread may call it.
        """
        with self._lock:
            self._rests_until = inf
            self._entries.clear()
            self._starts.clear()
        self._queue.put(None)
        self._held.release()

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            used, parts = item
            try:
                self._use_all(used)  # before room is made
                self._use_all(used + [self._write(part) for part in parts if monotonic() >= self._rests_until])
            except Exception as error:  # whatever it is, the thread goes on, for somebody may wait for it
                self._wait(error, parts)
            with self._lock:
                self._pending -= sum(part.nbytes for part in parts)
                self._queued.difference_update(map(self._path, parts))

    def _wait(self, error: Exception, parts: Sequence[Part]) -> None:
        """Take nothing for a while, which doubles until as much is written again as these parts have: a disk that is
        nearly full has room for the smaller ones.
        """
        with self._lock:
            self._unsure = max(self._unsure, sum(part.nbytes for part in parts))
            self._rests_until = max(self._rests_until, monotonic() + self._rest)
            if self._rest == FIRST_REST:
                _logger.warning("kept prompts are not written, and tried again in %g s: %s", self._rest, error)
            self._rest = min(2 * self._rest, LONGEST_REST)

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.start}-{part.end}{SUFFIX}"

    def _write(self, part: Part) -> Entry:
        path = self._path(part)
        entry = Entry(path, part.start, part.end, part.tokens, part.keys.nbytes, part.state.nbytes)
        self._make_room(entry.nbytes)
        fields = {"version": VERSION, "mark": self._mark, "start": part.start, "end": part.end}
        sizes = {"tokens": len(part.tokens), "keys": entry.keys, "state": entry.state}
        header = json.dumps({**fields, **sizes, "checksum": self._checksum(part)}).encode()
        with atomic_file(path) as file:
            file.write(header.ljust(_HEADER_BYTES))
            for values in part.body:
                file.write(values.data)
        self._add(entry)
        self._note_written(part.nbytes)
        return entry

    def _note_written(self, size: int) -> None:
        self._unsure = max(0, self._unsure - size)
        if self._rest > FIRST_REST and not self._unsure:
            self._rest = FIRST_REST
            _logger.warning("kept prompts are written again")

    def _checksum(self, part: Part) -> str:
        sizes = (VERSION, self._mark, part.start, part.end, len(part.tokens), len(part.keys), len(part.state))
        found = blake2b(json.dumps(sizes).encode(), digest_size=16)
        for values in part.body:
            found.update(values.data)
        return found.hexdigest()

    def _index(self) -> None:
        """Find what is there, by headers and sizes. What has a name of ours and cannot be used is removed, with a line
        for all of it.
        """
        for unfinished in self._folder.glob("*.tmp"):  # of a process that was killed
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        found, wrong = [], 0
        for path in self._folder.glob(f"*{SUFFIX}"):
            try:
                found.append((path.stat().st_mtime_ns, self._entry(path)))
            except _UNSOUND:
                wrong += 1
                with suppress(OSError):  # a directory
                    path.unlink(missing_ok=True)
        if wrong:
            _logger.warning("kept prompts in %s: %d files that cannot be used are ignored", self._folder, wrong)
        for _, entry in sorted(found, key=lambda item: item[0]):
            self._add(entry)
        self._make_room(0)

    def _entry(self, path: Path) -> Entry:
        """Raises one of `_UNSOUND` for what no file of ours is."""
        with input_file(path, _READING) as file:
            header = self._header(file)
            count, keys, state = (int(header[name]) for name in ("tokens", "keys", "state"))
            tokens = _tokens_of(file.read(4 * max(0, count)))
        entry = Entry(path, str(header["start"]), str(header["end"]), tokens, keys, state)
        named = path.name == f"{entry.start}-{entry.end}{SUFFIX}"
        sized = path.stat().st_size == entry.nbytes and len(tokens) == count > 0
        held = keys == self._token_bytes * round_up(count, BLOCK) and state in (0, self._state_bytes)
        if header["version"] != VERSION or header["mark"] != self._mark or not (named and sized and held):
            raise ValueError(f"{path} has other fields")
        return entry

    @staticmethod
    def _header(file: BinaryIO) -> dict[str, Any]:
        header = json.loads(file.read(_HEADER_BYTES))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        return header

    def _add(self, entry: Entry) -> None:
        self._forget(entry, remove=False)
        with self._lock:
            self._entries[entry.path] = entry
            self._starts.setdefault(entry.start, []).append(entry)
            self._nbytes += entry.nbytes

    def use(self, entry: Entry) -> None:
        """It is used now."""
        with self._lock:
            if entry.path in self._entries:
                self._entries.move_to_end(entry.path)
        try:
            os.utime(entry.path)  # the order outlives the process
        except OSError:
            self._forget(entry)

    def _use_all(self, entries: Sequence[Entry]) -> None:
        """A beginning stays longer than what follows it."""
        for entry in reversed(entries):
            self.use(entry)

    def _make_room(self, size: int) -> None:
        while oldest := self._oldest_beside(size):
            self._forget(oldest)

    def _oldest_beside(self, size: int) -> Entry | None:
        """The file that gives way to so many bytes; None where there is room for them."""
        with self._lock:
            return next(iter(self._entries.values()), None) if self._nbytes + size > self._limit else None

    def _forget(self, entry: Entry, remove: bool = True) -> bool:
        """Returns whether it was known."""
        with self._lock:
            known = self._entries.pop(entry.path, None)
            if known:
                self._nbytes -= known.nbytes
                self._starts[known.start].remove(known)
                if not self._starts[known.start]:
                    del self._starts[known.start]
        if known and remove:
            try:
                entry.path.unlink(missing_ok=True)
            except OSError as error:
                _logger.warning("%s cannot be removed: %s", entry.path, error.strerror)
        return known is not None


def _tokens_of(content: bytes) -> Tokens:
    return np.frombuffer(content, "<i4").astype(np.int32)
