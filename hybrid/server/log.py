"""What a server writes for people: lines that wait for whoever reads them, and hold up nobody."""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread

from hybrid.printable import printable

MOST = 1000  # lines that wait
_CLOSE_SECONDS = 1.0
_told = logging.getLogger("hybrid.told")
_told.setLevel(logging.INFO)


def tell(line: str) -> None:
    """A line of the log, without control characters. It goes where `lines_to` says, else nowhere."""
    _told.info("%s", printable(line))


def stderr() -> int | None:
    """The descriptor of the standard error that this process was started with; None where it was closed, and its number
    may have become that of another file.
    """
    try:
        return None if sys.__stderr__ is None else sys.__stderr__.fileno()
    except (OSError, ValueError):
        return None


def lines_or_nothing(descriptor: int | None, most: int = MOST) -> logging.Handler:
    """A handler that writes there. descriptor: None for nowhere."""
    return logging.NullHandler() if descriptor is None else Lines(descriptor, most)


@contextmanager
def lines_to(descriptor: int | None, most: int = MOST) -> Iterator[None]:
    """While it lasts, what is told and every warning is written there."""
    lines = lines_or_nothing(descriptor, most)
    logging.getLogger().addHandler(lines)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(lines)
        lines.close()


class Lines(logging.Handler):
    """Writes lines on a thread of its own. Where nobody reads and `most` of them wait the next ones are lost, and the
    first that is not comes behind one that says how many.
    """

    def __init__(self, descriptor: int, most: int = MOST) -> None:
        super().__init__()
        self._descriptor, self._most, self._lost, self._over = descriptor, most, 0, False
        # A garbage collection may log in the midst of `put`, which this kind of queue alone allows.
        self._waiting: SimpleQueue[str | None] = SimpleQueue()
        self._thread = Thread(target=self._write_all, name="hybrid-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the lock of the handler."""
        try:
            line = self.format(record)
        except Exception as error:  # the fault of whoever logs, who shall not fail by it
            line = printable(f"{record.pathname}:{record.lineno} logs what cannot be written: {error!r:.200}")
        if self._waiting.qsize() >= self._most:
            self._lost += 1
            return
        self._tell_lost()
        self._waiting.put(line)

    def close(self) -> None:
        """Wait until all is written, but not for long: perhaps nobody reads. Whoever reads slowly is told at the end
        how many lines are missing.
        """
        self.acquire()
        try:
            self._tell_lost()
            self._waiting.put(None)
        finally:
            self.release()
        self._thread.join(_CLOSE_SECONDS)
        self._over = True
        self._thread.join(_CLOSE_SECONDS)
        super().close()

    def _tell_lost(self) -> None:
        lost, self._lost = self._lost, 0
        if lost:
            self._waiting.put(_lost_text(lost))

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            over = self._over
            with suppress(OSError):  # there is nobody, who may come back
                text = _lost_text(self._waiting.qsize()) if over else line  # the None there stands for `line`
                self._write(f"{text}\n".encode(errors="backslashreplace"))
            if over:
                return

    def _write(self, data: bytes) -> None:
        """To the descriptor itself: whoever ends the process would wait for a lock of `sys.stderr`."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # others that have it too may want it so
                select.select([], [self._descriptor], [])


def _lost_text(count: int) -> str:
    return f"{count} lines of the log are lost: nobody read it in time"
