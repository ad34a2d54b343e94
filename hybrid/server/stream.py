"""Server-sent events, and answers that end when their client has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, TypeVar

from fastapi import Request, Response

from hybrid.server.exchange import Exchange, Receive, Scope, Send
from hybrid.server.refusals import ANTHROPIC, OLLAMA, RESPONSES, Refusal

T = TypeVar("T")


class Opening(bytes):
    """How a stream begins, before anything was computed."""


class Silence(bytes):
    """What a stream says while there is nothing to say."""


PING = Silence(b": ping\n\n")
DONE = b"data: [DONE]\n\n"


class Quiet:
    """How long a stream has said nothing though pieces come, of reasoning that is not told."""

    def __init__(self, seconds: float) -> None:
        """seconds: after which it says that it is there."""
        self._seconds, self._since = seconds, monotonic()

    def ends(self, said: object, pieces: Sequence[object]) -> bool:
        """Whether something is to be sent: what is said, or that there is nothing to say."""
        if not said and pieces and monotonic() - self._since < self._seconds:
            return False
        self._since = monotonic()
        return True


class ClientGone(Exception):
    """Nobody waits for the answer."""


def plain(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + plain(data) + b"\n\n"


def named_event(data: Mapping[str, Any]) -> bytes:
    """Its name is its type."""
    return f"event: {data['type']}\n".encode() + event(data)


def line(data: Mapping[str, Any]) -> bytes:
    return plain(data) + b"\n"


def last_event(path: str, refusal: Refusal, events: int = 0) -> bytes:
    """How a stream ends that cannot go on, as the API has it that the path is of. events: that were sent before."""
    if path.startswith(OLLAMA):
        return line(refusal.body_for(path))
    if path.startswith(ANTHROPIC):
        return named_event(refusal.body_for(path))
    if path == RESPONSES:
        said = {"code": refusal.code or "server_error", "message": refusal.message, "param": refusal.param}
        return named_event({"type": "error", "sequence_number": events, **said})
    return event(refusal.body)


class EventStream(Response):
    """Sends events as they come, and what ends them early as a last one. close: called in every case, once."""

    def __init__(
        self, events: AsyncIterator[bytes], close: Callable[[], None], media_type: str = "text/event-stream"
    ) -> None:
        super().__init__(media_type=media_type, headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await until_gone(receive, self._send(scope["path"], send))
        finally:
            self._close()

    async def _send(self, path: str, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Refusal as refusal:
            await send({"type": "http.response.body", "body": last_event(path, refusal), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What it returns, unless the client leaves before: then it is cancelled. Raises ClientGone.

    The body of the request has been read already.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def exchange_of(request: Request) -> Exchange:
    exchange: Exchange = request.scope["state"]["exchange"]
    return exchange
