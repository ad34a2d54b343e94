"""Fairness between clients by virtual token counters: who has got least comes first (Sheng et al., OSDI 2024)."""

from __future__ import annotations

from collections import Counter

ROW = 1  # what a computed token costs a client, of its prompt or of its answer
TOKEN = 1  # and a token that was chosen beside, so that the answer's count twice, as in the paper


class Fairness:
    """What each client has got, in virtual tokens. A client that comes back after a pause begins with what the least
    served of those present has got: nobody saves up turns, and nobody is punished for having been alone.
    """

    def __init__(self) -> None:
        self._got: dict[str, int] = {}
        self._jobs: Counter[str] = Counter()
        self._last = 0  # what the client had got that left last, when nobody was present any more

    def enter(self, client: str) -> None:
        """A job of this client has arrived."""
        if not self._jobs[client]:
            self._got[client] = max(self._got.get(client, 0), self._floor())
        self._jobs[client] += 1

    def leave(self, client: str) -> None:
        """A job of this client has ended."""
        self._jobs[client] -= 1
        if self._jobs[client]:
            return
        del self._jobs[client]
        if not self._jobs:
            self._last = self._got[client]
        floor = self._floor()  # those who are absent and have got no more would begin there anyhow
        self._got = {name: got for name, got in self._got.items() if name in self._jobs or got > floor}

    def charge(self, client: str, rows: int, tokens: int) -> None:
        """The client got so many computed rows and so many chosen tokens."""
        self._got[client] += ROW * rows + TOKEN * tokens

    def got(self, client: str) -> int:
        """Whose is less comes first."""
        return self._got[client]

    def _floor(self) -> int:
        return min((self._got[client] for client in self._jobs), default=self._last)
