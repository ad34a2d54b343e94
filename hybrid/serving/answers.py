"""What the engine's thread gives, for asyncio."""

from __future__ import annotations

import asyncio
from typing import Any


class Answers:
    """A queue from the engine's thread to the event loop that runs when it is made."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._event_loop = asyncio.get_running_loop()

    def put(self, answer: Any) -> None:
        """A sink. Raises RuntimeError once the event loop is closed."""
        self._event_loop.call_soon_threadsafe(self._queue.put_nowait, answer)

    async def get(self) -> Any:
        """The next; raised if it is an error."""
        answer = await self._queue.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def ready(self) -> list[Any]:
        """What else has come, up to the next error, which stays."""
        answers = []
        while not self._queue.empty() and not isinstance(self._queue._queue[0], BaseException):  # type: ignore[attr-defined]
            answers.append(self._queue.get_nowait())
        return answers
