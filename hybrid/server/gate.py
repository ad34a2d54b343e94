"""The one layer before everything: who may ask, from where, and what is written about it.

Paths are compared as they were sent: what is not literally one of the open ones needs a key, however it would be read
later.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from ipaddress import ip_address

from hybrid.server.clients import CLIENT, URGENT
from hybrid.server.config import ServerConfig
from hybrid.server.exchange import LOOPBACK, OPEN, App, Exchange, Receive, Scope, Send, host_of
from hybrid.server.page import PATHS
from hybrid.server.refusals import Refusal, internal
from hybrid.server.telemetry import Telemetry


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: App, config: ServerConfig, telemetry: Telemetry | None = None) -> None:
        self._app, self._config, self._telemetry = app, config, telemetry
        keys = config.all_keys()
        self._digests, self._urgent = [_digest(key) for key in keys], [*keys.values()]
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
        number = self._key_number(exchange)
        CLIENT.set("" if number is None else f"key {number}")
        URGENT.set(not self._digests or (number is not None and self._urgent[number]))
        if self._digests and not exchange.is_for(self._open) and number is None:
            return Refusal(401, "give a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key")
        return None

    def _host_allowed(self, exchange: Exchange) -> bool:
        """A page whose name is made to lead to this machine cannot read what needs no key."""
        if self._digests or self._config.host not in LOOPBACK:
            return True
        host = exchange.headers.get(b"host", b"").decode("latin-1")
        return host_of(f"//{host}") in LOOPBACK

    def _origin_allowed(self, exchange: Exchange) -> bool:
        origin = exchange.headers.get(b"origin")
        return origin is None or host_of(origin.decode("latin-1")) in LOOPBACK or self._is_own_page(exchange, origin)

    def _is_own_page(self, exchange: Exchange, origin: bytes) -> bool:
        """Whether the page of this very server asks. Without keys its address must be a number: any page can have a
        name of its own lead here.
        """
        host = exchange.headers.get(b"host", b"").decode("latin-1")
        same = origin.decode("latin-1").partition("://")[2] == host
        return same and (bool(self._digests) or _is_number(host_of(f"//{host}")))

    def _key_number(self, exchange: Exchange) -> int | None:
        """Which of the keys was given; None if it is none of them."""
        scheme, _, given = exchange.headers.get(b"authorization", b"").partition(b" ")
        key = given.strip() if scheme.lower() == b"bearer" else exchange.headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(key).digest()
        same = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whichever fits
        return same.index(True) if any(same) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_number(host: str | None) -> bool:
    try:
        return bool(ip_address(host or ""))
    except ValueError:
        return False
