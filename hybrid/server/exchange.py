"""One request and its answer, as the layers around the application see it."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime
from time import perf_counter, time
from typing import Any
from urllib.parse import urlsplit

from hybrid.printable import printable
from hybrid.server.config import ServerConfig
from hybrid.server.failures import log_failure
from hybrid.server.log import tell

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = {"/live", "/ready"}  # besides the files of the page
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CORS = {
    b"access-control-allow-methods": b"GET, POST",
    b"access-control-allow-headers": b"authorization, content-type, x-api-key, x-request-id, "
    b"anthropic-version, anthropic-beta",
    b"access-control-max-age": b"600",
}


@dataclass
class Exchange:
    """What is known of it, from when it arrives."""

    scope: Scope
    outer: Send
    config: ServerConfig
    headers: dict[bytes, bytes] = field(init=False)
    id: str = field(init=False)
    status: int | None = None
    tokens: tuple[int, int] | None = None  # of the prompt and produced, for the log
    moments: tuple[float, ...] = ()  # of `perf_counter`: made, prompt begun, first token, finished
    begun: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        self.headers = dict(reversed(self.scope["headers"]))
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    @property
    def path(self) -> str:
        path: str = self.scope["path"]
        return path

    def is_for(self, paths: set[str]) -> bool:
        return self.path in paths and self.scope.get("raw_path", self.path.encode()) == self.path.encode()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """To the client; TimeoutError if it takes nothing for too long."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.id.encode()), *self._cors()]
        async with asyncio.timeout(self.config.send_seconds):
            await self.outer(message)

    async def send_preflight(self) -> None:
        await self.send({"type": "http.response.start", "status": 204, "headers": list(_CORS.items())})
        await self.send({"type": "http.response.body", "body": b""})

    def _cors(self) -> list[tuple[bytes, bytes]]:
        origin = self.headers.get(b"origin")
        allowed = origin is not None and host_of(origin.decode("latin-1")) in LOOPBACK
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")] if allowed and origin else []

    def log_failure(self, error: BaseException) -> None:
        """Where it happened, without what it says: that may hold a text of the client."""
        log_failure(error, self.id)

    def log_end(self) -> None:
        if self.config.log == "none" or (self.is_for(OPEN) and self.status in (200, 503)):  # asked every second
            return
        as_json = self.config.log == "json"
        known = {"prompt_tokens": self.tokens[0], "completion_tokens": self.tokens[1]} if self.tokens else {}
        facts: dict[str, Any] = {
            "time": round(time(), 3) if as_json else datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "request": self.id,
            "method": self.scope["method"],
            "path": printable(self.scope["path"])[:200].replace("\n", "\\n"),
            "status": self.status,
            "seconds": round(perf_counter() - self.begun, 4),
            **known,
        }
        line = json.dumps(facts) if as_json else " ".join(f"{name}={value}" for name, value in facts.items())
        tell(line)


def host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
