"""Connections: how many there may be at once, and how long one may be open without a request."""

from __future__ import annotations

import asyncio
import resource
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEAD_SECONDS = 60.0  # in which a request must have come; at most twice that
MOST = 4096
_WANTED = 1 << 16  # descriptors, where the system allows so many
_OWN = 128  # descriptors of everything else: files of the model, pipes of processes
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def descriptors() -> int:
    """How many this process may have, after raising that as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _WANTED if soft == resource.RLIM_INFINITY else soft


def bounds() -> tuple[int, int]:
    """(connections that may be open, those that are taken at a time before they are counted): together they leave the
    descriptors that the engine needs.
    """
    there = descriptors()
    at_once = max(8, min(1024, there // 4))
    return max(8, min(MOST, there - at_once - _OWN)), at_once


_RUNNING = object()  # in place of a request whose answer was not complete


class Connection(H11Protocol):
    """One connection. Beyond `limit` of them it is told 503 and closed; one that sends no request is closed after a
    while, however slowly its bytes come.
    """

    def __init__(self, *arguments: Any, limit: int = MOST, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._limit = limit
        self._seen: RequestResponseCycle | object | None = None
        self._look: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limit:
            transport.write(_FULL)
            transport.close()
        else:
            self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look:
            self._look.cancel()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        self._look = self.loop.call_later(HEAD_SECONDS, self._look_at)

    def _look_at(self) -> None:
        """Closes a connection on which nothing runs and no request has come since the look before."""
        last: RequestResponseCycle | None = self.cycle
        if (last is None or last.response_complete) and last is self._seen:
            self.transport.close()
        else:
            # what still runs at a look is not silent since then, so the next look has seen nothing of it
            self._seen = last if last is None or last.response_complete else _RUNNING
            self._look_later()


def protocol(limit: int) -> Any:
    """What uvicorn makes of each connection."""
    return partial(Connection, limit=limit)
