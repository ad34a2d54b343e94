"""A server from its first signal of life to its last: it listens, loads, answers, drains, ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import uvicorn

from hybrid.errors import ConfigError
from hybrid.server import connections
from hybrid.server.config import ServerConfig
from hybrid.server.exchange import App


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)
Loaded = TypeVar("Loaded", contravariant=True)
Progress = Callable[[str, int, int], None]
Load = Callable[[Progress], T]
_INTERRUPTED = 130
_CLOSE_SECONDS = 5  # for connections that are to be closed


class _Abandoned(BaseException):
    """Ends loading when nobody waits for it."""


def listen(config: ServerConfig) -> socket.socket:
    """A socket that takes connections. Raises ConfigError."""
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        code = getattr(error, "errno", None) or 0  # what is negative is no error of the system, but of the name
        reason = os.strerror(code) if code > 0 else getattr(error, "strerror", None) or "no such address"
        raise ConfigError(
            f"--host {config.host} --port {config.port} cannot be listened at ({reason}); give another"
        ) from None
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections have it: no part waits for an ACK
    listening.setblocking(False)
    return listening


class Served(Protocol[Loaded]):
    """What a process loads for, and drains. Lives on its event loop."""

    config: ServerConfig
    progress: tuple[str, int, int] | None  # of loading; any thread sets it

    def opened(self, loaded: Loaded) -> None:
        """It is loaded."""

    def watch(self, reopen: Callable[[], Any], on_lost: Callable[[BaseException], None]) -> None:
        """reopen: loads it anew, on another thread. on_lost: is called where that has failed."""

    @property
    def taken(self) -> int:
        """Completions that run or wait."""

    async def drain(self, seconds: float) -> None:
        """Take nothing more; wait for what runs, and after so long end it by an error."""


class Process(uvicorn.Server, Generic[T]):
    """app: what answers. load: makes what it needs, on a thread of its own while requests are answered. on_ready:
    called once that is there. notice: told in one line what whoever ends it has to wait for.

    The first SIGTERM or Ctrl-C drains, the second ends the process at once.
    """

    def __init__(
        self,
        app: App,
        service: Served[T],
        load: Load[T],
        on_ready: Callable[[T], None] = lambda loaded: None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        limit, at_once = connections.bounds()
        super().__init__(
            uvicorn.Config(
                app,
                http=connections.protocol(limit),
                backlog=at_once,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=_CLOSE_SECONDS,
                h11_max_incomplete_event_size=64 << 10,
            )
        )
        self.service = service
        self.error: BaseException | None = None  # of loading
        self.lost = False  # whether there was an engine, and none could be opened in its place
        self._load, self._on_ready, self._notice = load, on_ready, notice
        service.watch(partial(self._load, self._note), self._lose)
        self._ending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._open, name="hybrid-load", daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; also called by whoever wants the server to end."""
        if self._ending:
            logging.shutdown()  # what waits in the log is written, as long as somebody reads it
            os._exit(_INTERRUPTED)
        self.end()

    def end(self) -> None:
        """Drain, then end; from any thread."""
        self._ending = True
        if self._loop is None or self._loop.is_closed():
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if count := self.service.taken:
            left, seconds = f"{count} completion{'s' * (count != 1)}", self.service.config.drain_seconds
            self._notice(f"waiting up to {seconds:g} s for {left} to end; a second signal ends them at once")
        self._drain = asyncio.ensure_future(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        try:
            await self.service.drain(self.service.config.drain_seconds)
        finally:
            self.should_exit = True

    def _open(self) -> None:
        """On a thread: load, and tell the event loop."""
        try:
            loaded = self._load(self._note)
        except BaseException as error:
            if not isinstance(error, _Abandoned):
                self.error = error
            self.should_exit = True
            return
        if self._ending:
            return loaded.close()
        self._tell(self._opened, loaded)

    def _lose(self, error: BaseException) -> None:
        """There is no engine any more: whoever watches over the process may start another."""
        self.error, self.lost, self.should_exit = error, True, True

    def _note(self, what: str, done: int, total: int) -> None:
        if self._ending:
            raise _Abandoned
        self.service.progress = (what, done, total)

    def _opened(self, loaded: T) -> None:
        self.service.opened(loaded)
        self._on_ready(loaded)

    def _tell(self, call: Callable[..., Any], *arguments: Any) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(call, *arguments)
