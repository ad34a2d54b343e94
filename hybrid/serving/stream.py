"""The pieces of one completion, for a thread that takes them."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, SimpleQueue
from types import TracebackType

from hybrid.core import Completion, TextDelta
from hybrid.serving.loop import Loop
from hybrid.serving.request import Request


class Stream(Iterator[TextDelta]):
    """The request begins when the first piece is asked for; then the engine goes on whether pieces are taken or not.

    Closing it, or an exception while it waits, cancels the request as `Loop.cancel` does; so does dropping it, but
    without waiting, for the garbage collector does that anywhere.
    """

    def __init__(self, loop: Loop, request: Request) -> None:
        self._loop, self._request = loop, request
        self._items: SimpleQueue[TextDelta | BaseException] = SimpleQueue()
        self._next: TextDelta | BaseException | None = None  # that `ready` has seen already
        self._begun = self._over = False
        request.sink = self._items.put

    @property
    def completion(self) -> Completion:
        """What there is so far, whole with the last piece."""
        return self._request.completion

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """How many tokens of the prompt have been computed, and how many it has."""
        total = len(self._request.prompt)
        return min(self._request.computed, total), total

    def ready(self, seconds: float) -> bool:
        """Begin, and wait for the next piece, but not longer than that; returns whether there is one, or the end."""
        if self._over or self._next is not None:
            return True
        try:
            self._begin()
            self._next = self._items.get(timeout=seconds)
        except Empty:
            return False
        except BaseException:
            self.close()
            raise
        return True

    def __next__(self) -> TextDelta:
        if self._over:
            raise StopIteration
        try:
            self._begin()
            item, self._next = self._next, None
            if isinstance(item, BaseException):
                raise item
            delta: TextDelta = item or self._loop.wait(self._items)
        except BaseException:
            self.close()
            raise
        self._over = delta.finish_reason is not None
        return delta

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._loop.submit([self._request])

    def close(self) -> None:
        """Cancel the request unless it has finished; no piece comes any more."""
        self._over = True
        if self._begun:
            self._loop.cancel([self._request])

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_begun", False) and not self._request.finished:
            self._loop.drop([self._request])
