"""One of several servers: it answers what a front asks of it, as it would answer a client."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from hybrid.cluster.asking import Asked, Ended, Message, Reply, Taken
from hybrid.server.app import endpoints
from hybrid.server.clients import CLIENT, NOBODY, URGENT
from hybrid.server.config import ServerConfig
from hybrid.server.exchange import Exchange
from hybrid.server.failures import log_failure
from hybrid.server.refusals import internal
from hybrid.server.service import Service


def options_of(front: ServerConfig) -> ServerConfig:
    """What replicas are told: a front demands the keys, counts what each of them has, and logs."""
    return replace(front, api_key=(), api_key_file=None, key_requests=None, key_tokens_per_minute=None, log="none")


class Replica:
    """Lives on the event loop of its service. name: by which the front knows it."""

    def __init__(self, name: str, service: Service) -> None:
        self.name, self.service = name, service
        self._app = endpoints(service)

    async def answer(self, asked: Asked) -> AsyncGenerator[Reply, None]:
        """The messages of its answer, as many at once as there are; the last when all is counted. Closing it ends the
        request.
        """
        yield Taken(self.name, self.service.tell_charged(asked.client))
        said: asyncio.Queue[Message | None] = asyncio.Queue()
        exchange = Exchange(_scope(asked), _put_into(said), self.service.config)
        task = asyncio.ensure_future(self._run(asked, exchange))
        task.add_done_callback(lambda _: said.put_nowait(None))
        try:
            messages: list[Message] = []
            while (message := await said.get()) is not None:
                messages.append(message)
                if said.empty() and message.get("more_body"):
                    yield messages
                    messages = []
            yield Ended(messages, exchange.tokens, self.service.tell_charged(asked.client))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def whole(self, asked: Asked) -> list[Message]:
        """All of an answer that is not long and costs no client anything."""
        messages: list[Message] = []
        async for reply in self.answer(replace(asked, client=NOBODY)):
            if not isinstance(reply, Taken):
                messages += reply.messages if isinstance(reply, Ended) else reply
        return messages

    async def state(self) -> dict[str, Any]:
        """What it does now."""
        service = self.service
        counts = {"ready": service.ready, "running": service.running(), "waiting": service.waiting()}
        return {**counts, "machine": platform.node(), "pid": os.getpid()}

    async def metrics(self) -> str:
        """Its counters, as Prometheus reads them."""
        return self.service.metrics.text().decode()

    async def described(self) -> list[str]:
        """Its plan and its model, for people."""
        return self.service.described()

    async def _run(self, asked: Asked, exchange: Exchange) -> None:
        CLIENT.set(asked.client)
        URGENT.set(asked.urgent)
        exchange.scope["state"] = {"exchange": exchange}
        receive = _Body(asked.body)
        try:
            await self._app(exchange.scope, receive, exchange.send)
        except Exception as error:
            log_failure(error, exchange.id)
            if exchange.status is None:
                await internal().response(asked.path)(exchange.scope, receive, exchange.send)
        finally:
            if self.service.telemetry:
                self.service.telemetry.note(exchange)


class _Body:
    """What an application receives: all of the body at once, and then nothing any more."""

    def __init__(self, body: bytes) -> None:
        self._messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def __call__(self) -> Message:
        if not self._messages:
            await asyncio.Future()  # whoever leaves ends the task
        return self._messages.pop()


def _put_into(said: asyncio.Queue[Message | None]) -> Any:
    async def send(message: Message) -> None:
        said.put_nowait(message)

    return send


def _scope(asked: Asked) -> Message:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": asked.query,
        "root_path": "",
        "headers": list(asked.headers),
        "client": None,
        "server": None,
    }
