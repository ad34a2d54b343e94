"""What one API key may have: completions that run or wait, tokens a minute, and texts that are looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from time import monotonic

from hybrid.server.config import ServerConfig
from hybrid.server.refusals import Refusal


class Quotas:
    """Counts what every client has. clock: seconds that never go back. Texts (`/tokenize` and the like) cost no
    completion and no token: as many as completions are looked at together, counted apart.

    Tokens are known when a completion has ended. A client owes what it got beyond its minute, and is let in again when
    as much time has passed as pays for that; what it does not use does not add up beyond a minute.
    """

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = monotonic) -> None:
        self._requests, self._tokens = config.key_requests, config.key_tokens_per_minute
        self._clock = clock
        self._taken: Counter[str] = Counter()
        self._texts: Counter[str] = Counter()
        self._left: dict[str, tuple[float, float]] = {}  # tokens left of those who got any, and when that was counted
        self._totals: Counter[str] = Counter()

    def require(self, client: str, count: int) -> None:
        """Raise Refusal where a client may not have so many completions more."""
        if self._requests is not None and count > self._requests:
            message = (
                f"{count} completions are more than the {self._requests} that a key may have together; ask for fewer"
            )
            raise Refusal(400, message, param="n")
        if self._requests is not None and self._taken[client] + count > self._requests:
            message = f"{self._taken[client]} completions of this key run or wait, and it may have {self._requests}"
            raise Refusal(429, f"{message}; try again later", code="rate_limit_exceeded")
        left = self._left_of(client)
        if self._tokens is not None and left <= 0:
            seconds = max(1, ceil((1 - left) * 60 / self._tokens))
            message = f"this key had its {self._tokens} tokens a minute; try again in {seconds} seconds"
            raise Refusal(429, message, code="rate_limit_exceeded", retry=seconds)

    def require_text(self, client: str) -> None:
        """Raise Refusal where a client may not have one more text looked at."""
        if self._requests is not None and self._texts[client] >= self._requests:
            message = f"{self._texts[client]} texts of this key are looked at, and it may have {self._requests}"
            raise Refusal(429, f"{message}; try again later", code="rate_limit_exceeded")

    def take(self, client: str, count: int) -> None:
        """So many completions more of a client run or wait; fewer, where it is negative."""
        _add(self._taken, client, count)

    @contextmanager
    def completions(self, client: str, count: int) -> Iterator[None]:
        """While so many completions of a client run or wait. Raises Refusal where it may not have them."""
        self.require(client, count)
        self.take(client, count)
        try:
            yield
        finally:
            self.take(client, -count)

    @contextmanager
    def text(self, client: str) -> Iterator[None]:
        """While one text of a client is looked at. Raises Refusal where it may not have it."""
        self.require_text(client)
        _add(self._texts, client, 1)
        try:
            yield
        finally:
            _add(self._texts, client, -1)

    def charge(self, client: str, tokens: int) -> None:
        """A client got so many tokens."""
        self._totals[client] += tokens
        if self._tokens is not None:
            self._left[client] = (self._left_of(client) - tokens, self._clock())

    def total(self, client: str) -> int:
        """Tokens that a client got since the start: for whoever counts those of several servers."""
        return self._totals[client]

    def _left_of(self, client: str) -> float:
        if self._tokens is None or client not in self._left:
            return self._tokens or 0
        left, then = self._left[client]
        return min(self._tokens, left + (self._clock() - then) * self._tokens / 60)


def _add(counts: Counter[str], client: str, count: int) -> None:
    """Clients that have nothing are forgotten."""
    counts[client] += count
    if not counts[client]:
        del counts[client]
