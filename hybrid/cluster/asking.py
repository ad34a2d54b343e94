"""What passes between the front and its replicas, and what can go wrong on the way."""

from __future__ import annotations

from collections.abc import AsyncGenerator, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from hybrid.cluster.prefixes import Prefix

Message = MutableMapping[str, Any]  # of ASGI


@dataclass(frozen=True)
class Asked:
    """A request whose client has been let in. client, urgent: by whose key, as `server.clients` has it."""

    method: str
    path: str
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    client: str = ""
    urgent: bool = True
    prefix: Prefix = Prefix()


@dataclass(frozen=True)
class Taken:
    """A replica has begun with a request. It is the first thing that comes back. total: tokens that its client got
    there since the replica began, those of what runs too. It only grows, so that what is lost on the way is told by the
    next one.
    """

    replica: str
    total: int = 0


@dataclass(frozen=True)
class Said:
    """More of the answer. messages: none, where there is only something to count. total: as that of `Taken`."""

    messages: list[Message]
    total: int = 0


@dataclass(frozen=True)
class Ended:
    """The answer is whole, and this is the last thing that comes back. messages: its end. tokens: of the prompt and
    produced, where known. total: as that of `Taken`.
    """

    messages: list[Message]
    tokens: tuple[int, int] | None = None
    total: int = 0


Reply = Taken | Said | Ended


class ReplicaLost(Exception):
    """The replica that had a request is not there any more."""


class QueueFull(Exception):
    """No replica takes one more, and as many requests wait for one as may."""


class Replicas(Protocol):
    """Those that there are, wherever they run. described: what one of them says of itself, for people."""

    described: list[str]

    def ask(self, asked: Asked) -> AsyncGenerator[Reply, None]:
        """The answer of one of them, as it comes; waits until one takes the request. Closing it ends the request.

        Raises ReplicaLost and QueueFull.
        """

    async def all_say(self, what: str, *arguments: Any) -> dict[str, Any]:
        """What each running replica answers, by its name, without waiting for one to be started."""

    def close(self) -> None:
        """End them all; any thread may call it."""
