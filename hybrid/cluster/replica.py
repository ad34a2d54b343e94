"""One of several servers: it answers what a front asks of it, as it would answer a client."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import AsyncGenerator
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Any

from hybrid.cluster.asking import Asked, Ended, Message, Reply, Said, Taken
from hybrid.server.app import endpoints
from hybrid.server.clients import CLIENT, NOBODY, URGENT
from hybrid.server.config import ServerConfig
from hybrid.server.exchange import Exchange
from hybrid.server.failures import log_failure
from hybrid.server.refusals import internal
from hybrid.server.service import Service

_TELL_SECONDS = 1.0  # after which a client's tokens are told though nothing is said
_COUNT_SECONDS = 0.1  # between two times that what runs is counted, whoever asks
_NOTHING: Message = {}


def options_of(front: ServerConfig) -> ServerConfig:
    """What replicas are told: a front demands the keys, counts what each of them has, and logs."""
    return replace(front, api_key=(), api_key_file=None, key_requests=None, key_tokens_per_minute=None, log="none")


class Replica:
    """Lives on the event loop of its service. name: by which the front knows it."""

    def __init__(self, name: str, service: Service) -> None:
        self.name, self.service = name, service
        self._app = endpoints(service)
        self._counted = -inf  # when what runs was counted

    async def answer(self, asked: Asked) -> AsyncGenerator[Reply, None]:
        """The messages of its answer, as many at once as there are; the last when all is counted. While nothing is said
        it tells from time to time what was computed. Closing it ends the request.
        """
        told = self._total(asked.client)
        yield Taken(self.name, told)
        said: asyncio.Queue[Message | None] = asyncio.Queue()
        exchange = Exchange(_scope(asked), _put_into(said), self.service.config)
        task = asyncio.ensure_future(self._run(asked, exchange))
        task.add_done_callback(lambda _: said.put_nowait(None))
        try:
            messages: list[Message] = []
            while (message := await _next(said)) is not None:
                total = self._total(asked.client)
                wanted = total != told
                if message is not _NOTHING:
                    messages.append(message)
                    wanted = said.empty() and message.get("more_body", False)
                if wanted:
                    yield Said(messages, total)
                    messages, told = [], total
            yield Ended(messages, exchange.tokens, self.service.admission.quotas.total(asked.client))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _total(self, client: str) -> int:
        """Tokens that a client got here, counted a moment ago at most."""
        if monotonic() - self._counted >= _COUNT_SECONDS:
            self.service.charge_running()
            self._counted = monotonic()
        return self.service.admission.quotas.total(client)

    async def whole(self, asked: Asked) -> list[Message]:
        """All of an answer that is not long and costs no client anything."""
        messages: list[Message] = []
        async for reply in self.answer(replace(asked, client=NOBODY)):
            if not isinstance(reply, Taken):
                messages += reply.messages
        return messages

    async def state(self) -> dict[str, Any]:
        """What it does now."""
        service = self.service
        counts = {
            "ready": service.ready,
            "running": service.admission.running(),
            "waiting": service.admission.waiting(),
        }
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


async def _next(said: asyncio.Queue[Message | None]) -> Message | None:
    """What is said next; `_NOTHING`, after a while."""
    try:
        async with asyncio.timeout(_TELL_SECONDS):
            return await said.get()
    except TimeoutError:
        return _NOTHING


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
