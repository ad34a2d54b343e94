"""Reads kept prompts from disk on a thread of its own, so that no step waits for a disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING

from hybrid.formats.block import BLOCK, round_up
from hybrid.serving.kept import Tokens, common_tokens
from hybrid.serving.prefix_files import Entry, Part, PrefixFiles

if TYPE_CHECKING:
    from hybrid.engine.saved import Saved

_logger = logging.getLogger("hybrid.prefixes")
PATIENCE = 10.0  # seconds without a file that was read, after which prompts are computed instead


@dataclass(frozen=True)
class Wanted:
    """The beginning of a prompt: what files hold of its tokens behind the first `start`, at most so many bytes."""

    tokens: Tokens
    start: int
    phase: int
    nbytes: int


@dataclass(frozen=True)
class Arrival:
    """A file that was read, whose tokens follow the first `start` of those that were wanted."""

    tokens: Tokens
    start: int
    phase: int
    part: Part
    saved: Saved


class PrefixReader:
    """Reads files for one prompt at a time, and has each checked before it arrives. blank: memory for so many tokens.
    stateful: whether a prompt can only go on from a state, so that files before one that has it arrive with it.
    """

    def __init__(self, files: PrefixFiles, blank: Callable[[int], Saved], stateful: bool) -> None:
        self._files, self._blank, self._stateful = files, blank, stateful
        self._wanted: SimpleQueue[Wanted | None] = SimpleQueue()
        self._arrivals: SimpleQueue[list[Arrival]] = SimpleQueue()
        self._news = threading.Event()
        self._busy = self._closed = False
        self._latest = 0.0  # when a file was last read, or begun with
        self._thread = threading.Thread(target=self._read_all, name="hybrid-prefix-reader", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether more will have arrived soon: it reads, and not without success for so long that it is better not
        waited for.
        """
        reads = self._busy and monotonic() - self._latest < PATIENCE
        return reads or not self._arrivals.empty()  # in this order: what is read last arrives before it is idle

    @property
    def idle(self) -> bool:
        """Whether it can be given something to read."""
        return not self._busy

    def begin(self, wanted: Wanted) -> None:
        """Read this; nothing else is being read."""
        self._busy, self._latest = True, monotonic()
        self._wanted.put(wanted)

    def arrived(self) -> list[Arrival]:
        """What was read since the last call, in its order. Never waits."""
        self._news.clear()
        found = list[Arrival]()
        while not self._arrivals.empty():
            found += self._arrivals.get()
        return found

    def wait(self, seconds: float) -> None:
        """Until something has arrived or all was read, at most so long."""
        self._news.wait(seconds)

    def close(self) -> None:
        """Read no more files than the one that is being read."""
        self._closed = True
        self._wanted.put(None)
        self._thread.join(PATIENCE)

    def _read_all(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            used = list[Entry]()
            try:
                self._read(wanted, used)
            except (OSError, MemoryError):
                pass  # there is no memory: what was read is there
            except Exception as error:  # whatever it is, the thread goes on, for somebody may wait for it
                _logger.warning("a kept prompt was not read: %s", error)
            finally:
                self._busy = False
                self._news.set()
            for entry in reversed(used):  # a beginning stays longer than what follows it
                self._files.use(entry)

    def _read(self, wanted: Wanted, used: list[Entry]) -> None:
        start, left, read = wanted.start, wanted.nbytes, list[Arrival]()
        while not self._closed and (entry := self._files.longest(wanted.tokens, start, wanted.phase)):
            left -= entry.nbytes
            if left < 0:
                return
            saved = self._blank(round_up(len(entry.tokens), BLOCK))
            if part := self._files.read(entry, saved.memory[: entry.keys]):
                used.append(entry)
                read.append(Arrival(wanted.tokens, start, wanted.phase, part, saved))
                self._latest = monotonic()
                if len(part.state) or not self._stateful:
                    self._arrivals.put(read)
                    self._news.set()
                    read = []
                shared = common_tokens(entry.tokens, wanted.tokens[start:])
                if shared < BLOCK:
                    return  # a tail, which nothing follows
                start += shared // BLOCK * BLOCK
