"""A server in a thread of the test, and what is asked of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import httpx
from dummy_engine import WATCHDOG

from hybrid import LLM
from hybrid.server.app import build
from hybrid.server.config import ServerConfig
from hybrid.server.process import Process, listen
from hybrid.server.service import Service

QUESTION = [{"role": "user", "content": "Tell me a story about a fox."}]


class Running:
    """A server that answers. http: a client of it."""

    def __init__(self, llm: LLM | None, telemetry: Any = None, again: Iterable[LLM] = (), **config: Any) -> None:
        """Without an llm it goes on loading. again: what it opens after the first one."""
        self._llms = chain([llm], again)
        options = ServerConfig(port=0, log="none", **config)
        self.service = Service(options, ("tiny", "also-tiny"), telemetry)
        self._socket, self._may_load = listen(options), threading.Event()
        self.process = Process(
            build(self.service), self.service, lambda progress: self._load(next(self._llms, None), progress)
        )
        self.port = self._socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.process.run, args=([self._socket],), daemon=True)
        self._thread.start()
        self.http = httpx.Client(base_url=self.address, timeout=WATCHDOG)
        if llm is not None:
            until(lambda: self.http.get("/ready").status_code == 200)

    def _load(self, llm: LLM | None, progress: Any) -> LLM:
        progress("packing", 3, 10)
        while llm is None:
            time.sleep(0.01)
            progress("packing", 3, 10)
        return llm

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits or is kept by mistake."""
        scheduler = self.service.llm.llm.loop._worker.scheduler
        return not (self.service.taken or self.service._runs) and not self.service.llm.llm.run(
            lambda: scheduler.has_work
        )

    def ended(self) -> bool:
        self._thread.join(WATCHDOG)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.http.close()
        self.process.end()
        assert self.ended()
        self.service.close()
        self._socket.close()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def events(self, path: str, **body: Any) -> list[Any]:
        """All events of a stream; the last is DONE as a text."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
            return list(parse_events(response.iter_lines()))


def parse_events(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
        else:
            assert line in ("", ": ping")


def until(condition: Any) -> None:
    """Wait for it."""
    for _ in range(100 * WATCHDOG):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


@contextmanager
def running(llm: LLM | None, **config: Any) -> Iterator[Running]:
    server = Running(llm, **config)
    try:
        yield server
    finally:
        server.close()
