"""What clients got at each replica, as the replicas tell it, on the account of one front."""

from __future__ import annotations

from collections import OrderedDict

from hybrid.server.quotas import Quotas

_MOST = 1 << 16  # clients of replicas that are remembered, of which there are as many as keys times replicas


class Charges:
    """Replicas tell running totals. Each of them counts for what it is more than the one before."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._totals: OrderedDict[tuple[str, str], int] = OrderedDict()

    def begin(self, replica: str, client: str, total: int) -> None:
        """A replica has taken a request. What the client got there before this front knew of it was on another account:
        replicas outlive fronts.
        """
        self._totals.setdefault((replica, client), total)
        self.note(replica, client, total)

    def note(self, replica: str, client: str, total: int) -> None:
        """So much has a client got there; an answer that was under way longer may tell less than is known."""
        known = self._totals.pop((replica, client), 0)
        self._totals[replica, client] = max(known, total)
        self._quotas.charge(client, max(0, total - known))
        while len(self._totals) > _MOST:
            self._totals.popitem(last=False)
