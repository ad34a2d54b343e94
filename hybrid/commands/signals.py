"""Signals that end a command, and a stretch of it that they must not cut short: what was measured is written first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]
EXIT_INTERRUPTED = 130


class Terminated(BaseException):
    """SIGTERM or SIGHUP. A command ends as with Ctrl-C, but what goes on after Ctrl-C, as a chat does, ends too."""


def _error_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def raise_signal(number: int, frame: FrameType | None) -> None:
    raise _error_of(number)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process while a program starts: nothing is written yet, and an exception in the middle of an import may
    come out as another one, or as none.
    """
    if logs := sys.modules.get("logging"):
        logs.shutdown()  # what waits in a log is written, as long as somebody reads it
    with suppress(Exception):  # stderr may be closed, or just be written to
        print("\n" * sys.stderr.isatty() + "interrupted", file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)


@contextmanager
def ending_signals(handle: Handler = raise_signal) -> Iterator[None]:
    """Give SIGTERM, SIGHUP and Ctrl-C to a handler. What is ignored stays so: after `nohup`, and behind a shell's &."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    try:
        numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handle)
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


class Interruptible:
    """A context in which signals interrupt `run` alone. One that comes before is raised when `run` begins, one that
    comes after it when the context is left: nothing in between, no `finally` either, is interrupted.
    """

    def __init__(self) -> None:
        self._late: BaseException | None = None
        self._signals = ending_signals(self._handle)

    def __enter__(self) -> Interruptible:
        self._signals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._signals.__exit__(None, None, None)
        if kind is None and self._late is not None:
            raise self._late

    def run(self, body: Callable[[], T]) -> T:
        """What the body returns, unless a signal ends it."""
        if self._late is not None:
            raise self._late
        return _marked(body)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is _marked.__code__:
                raise _error_of(number)
            frame = frame.f_back
        self._late = _error_of(number)


def _marked(body: Callable[[], T]) -> T:
    """Whether this is among the frames that a signal interrupts tells whether it may."""
    return body()
