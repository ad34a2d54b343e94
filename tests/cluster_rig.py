"""Several servers behind a front, all in one thread of the test: replicas that die when a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import httpx
from dummy_engine import WATCHDOG
from server_rig import until

from hybrid import LLM
from hybrid.cluster.affinity import Affinity
from hybrid.cluster.asking import Asked, QueueFull, ReplicaLost, Reply
from hybrid.cluster.config import ClusterConfig
from hybrid.cluster.front import Front
from hybrid.cluster.replica import Replica, options_of
from hybrid.server.config import ServerConfig
from hybrid.server.gate import Gate
from hybrid.server.process import Process, listen
from hybrid.server.service import Service


class Threadless:
    """Replicas on the event loop of their front. llms: those that there are from the beginning, by name."""

    def __init__(self, options: ServerConfig, llms: dict[str, LLM]) -> None:
        self.described = ["two of them"]
        self.asked: list[tuple[str, Asked]] = []
        self.full = False
        self.there: dict[str, Replica] = {}
        self._options, self._waiting = options_of(options), dict(llms)
        self._loads: dict[str, int] = {}
        self._services: list[Service] = []
        self._gone: dict[str, asyncio.Event] = {}
        self._affinity = Affinity()

    def add(self, name: str, llm: LLM) -> None:
        """One more is there, from the next look on."""
        self._waiting[name] = llm

    def kill(self, name: str) -> None:
        """It dies; called on the event loop."""
        del self.there[name]
        self._gone[name].set()

    async def ask(self, asked: Asked) -> AsyncGenerator[Reply, None]:
        if self.full:
            raise QueueFull
        while not self._replicas():
            await asyncio.sleep(0.01)
        name = self._affinity.order(asked.prefix, {name: self._loads[name] for name in self.there})[0]
        self._affinity.note(asked.prefix, name)
        self.asked.append((name, asked))
        gone = asyncio.ensure_future(self._gone[name].wait())
        self._loads[name] += 1
        try:
            async with aclosing(self.there[name].answer(asked)) as replies:
                while (reply := await _unless(gone, anext(replies, None))) is not None:
                    yield reply
        finally:
            gone.cancel()
            self._loads[name] -= 1

    async def all_say(self, what: str, *arguments: Any) -> dict[str, Any]:
        return {name: await getattr(replica, what)(*arguments) for name, replica in self._replicas().items()}

    def close(self) -> None:
        for service in self._services:
            service.close()

    def _replicas(self) -> dict[str, Replica]:
        for name, llm in self._waiting.items():
            service = Service(self._options, ("tiny",))
            service.opened(llm)
            self._services.append(service)
            self.there[name], self._loads[name], self._gone[name] = Replica(name, service), 0, asyncio.Event()
        self._waiting.clear()
        return dict(self.there)


async def _unless(gone: asyncio.Future[Any], coming: Any) -> Reply | None:
    """What comes. Raises ReplicaLost where its replica dies before."""
    reply = asyncio.ensure_future(coming)
    try:
        await asyncio.wait((reply, gone), return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ReplicaLost
        return reply.result()
    finally:
        reply.cancel()
        await asyncio.gather(reply, return_exceptions=True)


class Fronted:
    """A front that answers. http: a client of it."""

    def __init__(self, llms: dict[str, LLM], cluster: ClusterConfig, **config: Any) -> None:
        options = ServerConfig(port=0, log="none", **config)
        self.replicas = Threadless(options, llms)
        self.front = Front(options, cluster, ("tiny", "also-tiny"))
        self._socket = listen(options)
        self.process = Process(Gate(self.front, options), self.front, lambda progress: self.replicas)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self.process.run, args=([self._socket],), daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=WATCHDOG)
        until(lambda: self.front._replicas is not None)

    def on_loop(self, call: Any, *arguments: Any) -> None:
        done = threading.Event()
        self.process._loop.call_soon_threadsafe(lambda: (call(*arguments), done.set()))
        assert done.wait(WATCHDOG)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def ended(self) -> bool:
        self._thread.join(WATCHDOG)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.http.close()
        self.process.end()
        assert self.ended()
        self.front.close()
        self.replicas.close()
        self._socket.close()


@contextmanager
def fronted(llms: dict[str, LLM], cluster: ClusterConfig | None = None, **config: Any) -> Iterator[Fronted]:
    server = Fronted(llms, cluster or ClusterConfig(replicas=max(2, len(llms))), **config)
    try:
        yield server
    finally:
        server.close()
