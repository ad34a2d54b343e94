"""What the engine's thread gives, for asyncio."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any


class Answers:
    """A queue from the engine's thread to the event loop that runs when it is made."""

    def __init__(self) -> None:
        self._come: deque[Any] = deque()
        self._some = asyncio.Event()
        self._event_loop = asyncio.get_running_loop()

    def put(self, answer: Any) -> None:
        """A sink. Raises RuntimeError once the event loop is closed."""
        self._event_loop.call_soon_threadsafe(self._add, answer)

    def _add(self, answer: Any) -> None:
        self._come.append(answer)
        self._some.set()

    async def get(self) -> Any:
        """The next; raised if it is an error."""
        while not self._come:
            self._some.clear()
            await self._some.wait()
        answer = self._come.popleft()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def ready(self) -> list[Any]:
        """What else has come, up to the next error, which stays."""
        answers = []
        while self._come and not isinstance(self._come[0], BaseException):
            answers.append(self._come.popleft())
        return answers
