"""The one layer before everything: who may ask, from where, and what is written about it.

Paths are compared as they were sent: what is not literally one of the open ones needs a key, however it would be read
later.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import sys
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from time import perf_counter, time
from typing import Any
from urllib.parse import urlsplit

from hybrid.printable import printable
from hybrid.server.clients import CLIENT
from hybrid.server.config import ServerConfig
from hybrid.server.page import PATHS
from hybrid.server.refusals import Refusal, internal
from hybrid.server.telemetry import Telemetry

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
logger = logging.getLogger("hybrid.server")


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: App, config: ServerConfig, telemetry: Telemetry | None = None) -> None:
        self._app, self._config, self._telemetry = app, config, telemetry
        self._digests = [_digest(key) for key in config.all_keys()]
        self._open = OPEN | PATHS | ({"/metrics"} if config.open_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        exchange = Exchange(scope, send, self._config)
        scope.setdefault("state", {})["exchange"] = exchange
        try:
            if exchange.headers.get(b"origin") and scope["method"] == "OPTIONS" and self._origin_allowed(exchange):
                return await exchange.send_preflight()
            if (refusal := self._refusal(exchange)) is not None:
                return await refusal.response(exchange.path)(scope, receive, exchange.send)
            await self._app(scope, receive, exchange.send)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            exchange.log_failure(error)
            if exchange.status is None:
                await internal().response(exchange.path)(scope, receive, exchange.send)
        finally:
            exchange.log_end()
            if self._telemetry and not exchange.is_for(OPEN):
                self._telemetry.note(exchange)

    def _refusal(self, exchange: Exchange) -> Refusal | None:
        if not self._host_allowed(exchange):
            return Refusal(403, "this server is asked by a name that is not its own; use localhost, or set an API key")
        if not self._origin_allowed(exchange):
            return Refusal(403, "web pages of other machines may not use this server")
        client = self._client(exchange)
        CLIENT.set(client or "")
        if self._digests and not exchange.is_for(self._open) and client is None:
            return Refusal(401, "give a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key")
        return None

    def _host_allowed(self, exchange: Exchange) -> bool:
        """A page whose name is made to lead to this machine cannot read what needs no key."""
        if self._digests or self._config.host not in LOOPBACK:
            return True
        host = exchange.headers.get(b"host", b"").decode("latin-1")
        return _host_of(f"//{host}") in LOOPBACK

    def _origin_allowed(self, exchange: Exchange) -> bool:
        origin = exchange.headers.get(b"origin")
        return origin is None or _host_of(origin.decode("latin-1")) in LOOPBACK or self._is_own_page(exchange, origin)

    def _is_own_page(self, exchange: Exchange, origin: bytes) -> bool:
        """Whether the page of this very server asks. Without keys its address must be a number: any page can have a
        name of its own lead here.
        """
        host = exchange.headers.get(b"host", b"").decode("latin-1")
        same = origin.decode("latin-1").partition("://")[2] == host
        return same and (bool(self._digests) or _is_number(_host_of(f"//{host}")))

    def _client(self, exchange: Exchange) -> str | None:
        """Which of the keys was given; None if it is none of them."""
        scheme, _, given = exchange.headers.get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else exchange.headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(key).digest()
        same = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whichever fits
        return f"key {same.index(True)}" if any(same) else None


@dataclass
class Exchange:
    """One request and its answer, as the layer sees it."""

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
        allowed = origin is not None and _host_of(origin.decode("latin-1")) in LOOPBACK
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")] if allowed and origin else []

    def log_failure(self, error: BaseException) -> None:
        """Where it happened, without what it says: that may hold a text of the client."""
        log_failure(error, self.id)

    def log_end(self) -> None:
        if self.config.log == "none" or (self.is_for(OPEN) and self.status in (200, 503)):  # asked every second
            return
        known = {"prompt_tokens": self.tokens[0], "completion_tokens": self.tokens[1]} if self.tokens else {}
        facts: dict[str, Any] = {
            "time": round(time(), 3),
            "request": self.id,
            "method": self.scope["method"],
            "path": printable(self.scope["path"])[:200].replace("\n", "\\n"),
            "status": self.status,
            "seconds": round(perf_counter() - self.begun, 4),
            **known,
        }
        as_json = self.config.log == "json"
        line = json.dumps(facts) if as_json else " ".join(f"{name}={value}" for name, value in facts.items())
        print(line, file=sys.stderr, flush=True)


def log_failure(error: BaseException, request: str = "-") -> None:
    """The type of an error and its places in the code."""
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    logger.error("request %s failed: %s at %s", request, type(error).__name__, " < ".join(reversed(places[-8:])))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_number(host: str | None) -> bool:
    try:
        return bool(ip_address(host or ""))
    except ValueError:
        return False


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
