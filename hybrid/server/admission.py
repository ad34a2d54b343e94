"""What a server has taken, from whom, and whether it takes more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from hybrid.server.clients import CLIENT
from hybrid.server.config import ServerConfig
from hybrid.server.metrics import Metrics
from hybrid.server.quotas import Quotas
from hybrid.server.refusals import Refusal


class Admission:
    """Lives on the event loop of its service. places: how many sequences are computed at once. require_open: raises
    Refusal where nothing is taken.

    taken: completions that were let in, and have not ended. idle: set while there are none. texts: requests for texts
    alone.
    """

    def __init__(
        self, config: ServerConfig, metrics: Metrics, places: Callable[[], int], require_open: Callable[[], None]
    ) -> None:
        self.taken = self.texts = 0
        self.quotas = Quotas(config)
        self.idle = asyncio.Event()
        self.idle.set()
        self._queue = config.max_queue
        self._metrics, self._places, self._require_open = metrics, places, require_open

    def running(self) -> int:
        return min(self.taken, self._places())

    def waiting(self) -> int:
        return self.taken - self.running()

    def require_room(self, count: int = 1) -> None:
        """Raise Refusal where so many completions more are not taken."""
        self._require(partial(self.quotas.require, CLIENT.get(), count))
        if self.taken + count > self._places() + self._queue:
            self._metrics.refused.inc()
            raise Refusal(503, f"{self.taken} completions run or wait; try again later", code="queue_full")

    def take(self, client: str, count: int) -> None:
        """So many completions of a client more, or fewer."""
        self.taken += count
        self.quotas.take(client, count)
        self.idle.clear() if self.taken else self.idle.set()

    @contextmanager
    def text(self) -> Iterator[None]:
        """While a request is answered that wants texts or tokens and no completion, from before it is read on. It is
        counted apart. Raises Refusal where it is not taken.
        """
        client = CLIENT.get()
        self._require(partial(self.quotas.require_text, client))
        if self.texts >= self._places() + self._queue:
            self._metrics.refused.inc()
            raise Refusal(503, f"{self.texts} texts are looked at; try again later", code="queue_full")
        self.texts += 1
        try:
            with self.quotas.text(client):
                yield
        finally:
            self.texts -= 1

    def charge(self, tokens: int) -> None:
        """The client of this request got so many tokens beside those of its completions."""
        self.quotas.charge(CLIENT.get(), tokens)

    def _require(self, within: Callable[[], None]) -> None:
        """Raise Refusal where nothing is taken, or not from this client."""
        self._require_open()
        try:
            within()
        except Refusal:
            self._metrics.limited.inc()
            raise
