"""What a server writes for people: lines that wait for whoever reads them, and hold up nobody."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Full, Queue
from threading import Thread

from hybrid.printable import printable

MOST = 1000  # lines that wait
_CLOSE_SECONDS = 1.0
_told = logging.getLogger("hybrid.told")
_told.setLevel(logging.INFO)


def tell(line: str) -> None:
    """A line of the log, without control characters. It goes where `lines_to` says, else nowhere."""
    _told.info("%s", printable(line))


@contextmanager
def lines_to(descriptor: int, most: int = MOST) -> Iterator[None]:
    """While it lasts, what is told and every warning is written there."""
    lines = Lines(descriptor, most)
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
        self._descriptor, self._lost, self._over = descriptor, 0, False
        self._waiting: Queue[str | None] = Queue(most)
        self._thread = Thread(target=self._write_all, name="hybrid-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the lock of the handler."""
        try:
            self._put(self.format(record))
        except Full:
            self._lost += 1

    def close(self) -> None:
        """Wait until all is written, but not for long: perhaps nobody reads."""
        with suppress(Full):
            self._put(None, _CLOSE_SECONDS)
            self._thread.join(_CLOSE_SECONDS)
        self._over = True
        super().close()

    def _put(self, line: str | None, seconds: float = 0) -> None:
        """Raises Full."""
        if self._lost:
            self._waiting.put(f"{self._lost} lines of the log are lost: nobody read it in time", seconds > 0, seconds)
            self._lost = 0
        self._waiting.put(line, seconds > 0, seconds)

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None and not self._over:
            with suppress(OSError):  # there is nobody, who may come back
                self._write(f"{line}\n".encode(errors="backslashreplace"))

    def _write(self, data: bytes) -> None:
        """To the descriptor itself: whoever ends the process would wait for a lock of `sys.stderr`."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # others that have it too may want it so
                select.select([], [self._descriptor], [])
