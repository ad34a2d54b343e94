"""The pieces of several requests at once, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from hybrid.core import TextDelta
from hybrid.serving.answers import Answers
from hybrid.serving.loop import Loop
from hybrid.serving.request import Request

Piece = tuple[Request, TextDelta]


class Together:
    """Requests that are admitted together, in the event loop that runs when it is made; they begin at once."""

    def __init__(self, loop: Loop, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self._loop, self._answers = loop, Answers()
        self._left = len(self.requests)
        for request in self.requests:
            request.sink = partial(self._put, request)
        loop.submit(self.requests)

    def _put(self, request: Request, item: Any) -> None:
        self._answers.put(item if isinstance(item, BaseException) else (request, item))

    async def next(self, seconds: float | None = None) -> list[Piece]:
        """All pieces that have come, in their order; waits for one. None at all: the time is over. Raises the error of
        a request, which is the end of all of them.
        """
        try:
            async with asyncio.timeout(seconds):
                pieces: list[Piece] = [await self._answers.get()]
        except TimeoutError:
            return []
        pieces += self._answers.ready()
        self._left -= sum(delta.finish_reason is not None for _, delta in pieces)
        return pieces

    def over(self) -> bool:
        """Whether `next` has given every last piece."""
        return self._left == 0

    def fail(self, error: BaseException) -> None:
        """Have `next` raise this after what has come already."""
        self._answers.put(error)

    def close(self) -> None:
        """Cancel what has not finished; never waits."""
        self._loop.leave(self.requests)
