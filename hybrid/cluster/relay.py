"""The answer of a replica on its way to a client, which another one can begin anew while nothing of it was said."""

from __future__ import annotations

from hybrid.cluster.asking import Message, ReplicaLost
from hybrid.server.exchange import Receive, Scope, Send
from hybrid.server.refusals import Refusal
from hybrid.server.stream import Opening, Silence, last_event

_OURS = (b"x-request-id",)  # headers that the front writes itself
NAME = b"x-hybrid-replica"


class Relay:
    """One answer. begun: the client has got a part that another replica would not write alike."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.begun = self.over = False
        self._scope, self._send = scope, send
        self._status: int | None = None  # that the client got
        self._held: list[Message] = []  # of this replica's answer, until it says something
        self._events = 0

    async def pass_on(self, message: Message, replica: str) -> None:
        """Send a message, or keep it while nothing has been said. Raises ReplicaLost where the client has got the
        beginning of another answer.
        """
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name.lower() not in _OURS]
            self._held = [{**message, "headers": [*headers, (NAME, replica.encode())]}]
        elif isinstance(message["body"], Opening) and not self.begun:
            self._held.append(message)
        elif isinstance(message["body"], Silence) and not self.begun:
            await self._send_all(self._held[:1])
            self._held = self._held[1:]
            await self._send(message)
        else:
            held, self._held = self._held, []
            await self._send_all([*held, message])
            self.begun = True
            self.over = not message.get("more_body", False)

    def begin_anew(self) -> None:
        """Forget what a replica has written that is lost. Raises ReplicaLost once the client knows of it."""
        if self.begun:
            raise ReplicaLost
        self._held = []

    async def fail(self, refusal: Refusal, receive: Receive) -> None:
        """End the answer by an error."""
        path = self._scope["path"]
        if self._status is None:
            return await refusal.response(path)(self._scope, receive, self._send)
        if not self.over:
            await self._send({"type": "http.response.body", "body": last_event(path, refusal, self._events)})

    async def _send_all(self, messages: list[Message]) -> None:
        for message in messages:
            if message["type"] == "http.response.start":
                if self._status not in (None, message["status"]):
                    raise ReplicaLost
                if self._status is None:
                    self._status = message["status"]
                    await self._send(message)
            else:
                self._events += message["body"].count(b"\n\n")
                await self._send(message)
