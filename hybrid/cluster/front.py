"""The front of several servers: whoever asks is let in here, and answered by one of them.

It reads what a request begins with, which says where it goes, and asks another replica where one dies before it has
said anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing, suppress
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from hybrid.cluster.asking import Asked, Ended, Message, QueueFull, ReplicaLost, Replicas, Reply, Taken
from hybrid.cluster.charges import Charges
from hybrid.cluster.config import ClusterConfig
from hybrid.cluster.figures import Figures
from hybrid.cluster.prefixes import prefix_of
from hybrid.cluster.relay import Relay
from hybrid.server.app import endpoints
from hybrid.server.bodies import parse_object, read_bytes
from hybrid.server.clients import CLIENT, URGENT
from hybrid.server.config import ServerConfig
from hybrid.server.exchange import App, Exchange, Receive, Scope, Send
from hybrid.server.fields import completions_asked
from hybrid.server.page import PATHS
from hybrid.server.quotas import Quotas
from hybrid.server.refusals import RETRY_SECONDS, Refusal, internal
from hybrid.server.service import Service
from hybrid.server.stream import ClientGone, until_gone
from hybrid.server.texts import TEXT_PATHS

_ATTEMPTS = 3  # replicas that one request may be with when they die; more, and it may be the request
_KEPT = (b"authorization", b"x-api-key", b"cookie", b"origin", b"content-length", b"x-request-id")  # from replicas
_HERE = {"/live", "/openapi.json"} | PATHS  # which need no replica


class Front:
    """An ASGI application for the inside of a `Gate`. Lives on one event loop. names: of the model."""

    def __init__(self, config: ServerConfig, cluster: ClusterConfig, names: Sequence[str]) -> None:
        self.config, self.cluster = config, cluster
        self.progress: tuple[str, int, int] | None = None  # of loading; any thread sets it
        self.draining = False
        self.figures = Figures()
        self._replicas: Replicas | None = None
        self._quotas = Quotas(config)  # of keys, over all replicas
        self._charges = Charges(self._quotas)
        self._service = Service(config, names)  # it has no model, and answers what needs none
        self._local = endpoints(self._service)
        self._asking = {path for path, methods in self._local.openapi()["paths"].items() if "post" in methods}
        self._tasks: dict[asyncio.Task[None], Refusal | None] = {}  # with how they were ended
        self._idle = asyncio.Event()
        self._idle.set()

    def opened(self, replicas: Replicas) -> None:
        """The replicas can be asked from now on."""
        self._replicas = replicas

    def watch(self, reopen: Callable[[], Any], on_lost: Callable[[BaseException], None]) -> None:
        """Replicas are watched where they run."""

    @property
    def taken(self) -> int:
        """Requests that are not answered to their end, wherever they are."""
        return len(self._tasks)

    @property
    def replicas(self) -> Replicas:
        """Raises Refusal while there are none."""
        if self._replicas is None:
            raise Refusal(503, "the model is being loaded; try again later", code="loading")
        return self._replicas

    def close(self) -> None:
        """Give back what it has; the replicas are others'."""
        self._service.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._local(scope, receive, send)
        path, method = scope["path"], scope["method"]
        if method == "POST" and path in self._asking:
            return await self._forward(scope, receive, send)
        own = await self._own(scope) if method == "GET" and path not in _HERE else None
        await (own or self._local)(scope, receive, send)

    async def _own(self, scope: Scope) -> App | None:
        """What is answered for all replicas, or by any that runs; None: by none of them."""
        if scope["path"] in ("/ready", "/health"):
            return await self._state(scope["path"] == "/health")
        if self._replicas is None:
            return None
        if scope["path"] == "/metrics":
            texts = await self._replicas.all_say("metrics")
            return Response(self.figures.text(texts), media_type=CONTENT_TYPE_LATEST)
        answers = await self._replicas.all_say("whole", _asked(scope, b""))
        wanted = Request(scope).query_params.get("replica")
        name = wanted if wanted in answers else min(answers, default="")
        return _again(answers[name], name) if name else None

    async def _state(self, each: bool) -> Response:
        """each: say of each replica what it does, which is for those who have a key."""
        states = await self._replicas.all_say("state") if self._replicas else {}
        running = sum(state["ready"] for state in states.values())
        ready = not self.draining and self._replicas is not None and (running > 0 or self.cluster.fewest == 0)
        status = "ok" if ready else "no replica runs"
        if self.draining:
            status = "shutting down"
        elif self._replicas is None:
            status = "loading"
        facts: dict[str, Any] = {
            "status": status,
            "asked": len(self._tasks),
            "replicas": states if each else len(states),
        }
        if self._replicas is None and self.progress:
            facts["progress"] = dict(zip(("what", "done", "total"), self.progress, strict=True))
        return JSONResponse(facts, 200 if ready else 503, {} if ready else {"retry-after": str(RETRY_SECONDS)})

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay = Relay(scope, send)
        task = asyncio.ensure_future(self._answer(scope, receive, relay))
        self._tasks[task] = None
        self._idle.clear()
        try:
            await task
        except asyncio.CancelledError:
            if (refusal := self._tasks[task]) is None:
                task.cancel()
                raise
            await relay.fail(refusal, receive)
        except ClientGone:
            pass
        except Refusal as refusal:
            self.figures.limited.inc(refusal.status == 429)
            await relay.fail(refusal, receive)
        finally:
            del self._tasks[task]
            if not self._tasks:
                self._idle.set()

    async def _answer(self, scope: Scope, receive: Receive, relay: Relay) -> None:
        if self.draining:
            raise _shutting_down()
        client, text, exchange = CLIENT.get(), scope["path"] in TEXT_PATHS, scope["state"]["exchange"]
        with ExitStack() as held:
            held.enter_context(self._quotas.text(client)) if text else self._quotas.require(client, 1)
            replicas = self.replicas
            data = await read_bytes(Request(scope, receive), self.config.max_body_mb << 20)
            body = await parse_object(data)
            if not text:
                held.enter_context(self._quotas.completions(client, completions_asked(body)))
            asked = _asked(scope, data, body)
            await until_gone(receive, self._ask(replicas, asked, relay, exchange, held.close))

    async def _ask(
        self, replicas: Replicas, asked: Asked, relay: Relay, exchange: Exchange, on_end: Callable[[], None]
    ) -> None:
        """Of as many replicas as it takes. on_end: called before the client gets the last of it."""
        for _ in range(_ATTEMPTS):
            try:
                relay.begin_anew()
                return await self._ask_once(replicas, asked, relay, exchange, on_end)
            except QueueFull:
                self.figures.refused.inc()
                raise Refusal(503, "all replicas have as much as they take; try later", code="queue_full") from None
            except ReplicaLost:
                if relay.over:
                    return
                self.figures.lost.inc()
                if relay.begun:
                    message = "the replica that wrote this answer is gone; ask again"
                    raise Refusal(503, message, code="replica_lost") from None
                self.figures.moved.inc()
        raise internal()

    async def _ask_once(
        self, replicas: Replicas, asked: Asked, relay: Relay, exchange: Exchange, on_end: Callable[[], None]
    ) -> None:
        async with aclosing(replicas.ask(asked)) as replies:
            taken = await self._first(replicas, replies)
            name = taken.replica
            self._charges.begin(name, asked.client, taken.total)
            async for reply in replies:
                if isinstance(reply, Taken):
                    continue
                self._charges.note(name, asked.client, reply.total)  # before the client can ask for more
                if isinstance(reply, Ended):
                    exchange.tokens = reply.tokens
                    on_end()
                for message in reply.messages:
                    await relay.pass_on(message, name)

    async def _first(self, replicas: Replicas, replies: AsyncGenerator[Reply, None]) -> Taken:
        """What comes when a replica has taken a request. Raises Refusal where none is started in time."""
        first = asyncio.ensure_future(anext(replies))
        try:
            while not (await asyncio.wait([first], timeout=self.cluster.start_seconds))[0]:
                if not await replicas.all_say("state"):
                    message = f"no replica has started within {self.cluster.start_seconds:g} s; try again later"
                    raise Refusal(503, message, code="no_replica")
            taken = first.result()
            if not isinstance(taken, Taken):
                raise ReplicaLost
            return taken
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    async def drain(self, seconds: float) -> None:
        """Take nothing more; wait for what runs, and after so long end it by an error."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        for task in list(self._tasks):
            self._tasks[task] = _shutting_down()
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._idle.wait()


def _again(messages: list[Message], replica: str) -> App:
    """What a replica has answered, as an application."""

    async def send_all(scope: Scope, receive: Receive, send: Send) -> None:
        relay = Relay(scope, send)
        for message in messages:
            await relay.pass_on(message, replica)

    return send_all


def _shutting_down() -> Refusal:
    return Refusal(503, "the server is shutting down", code="shutting_down")


def _asked(scope: Scope, data: bytes, body: dict[str, Any] | None = None) -> Asked:
    exchange: Exchange = scope["state"]["exchange"]
    headers = [(name, value) for name, value in scope["headers"] if name not in _KEPT]
    return Asked(
        scope["method"],
        scope["path"],
        scope["query_string"],
        (*headers, (b"x-request-id", exchange.id.encode())),
        data,
        CLIENT.get(),
        URGENT.get(),
        prefix_of(body or {}),
    )
