"""Ray Serve's part of sending requests where their prefix lies; imported where Ray is."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from hybrid.cluster.affinity import Affinity
from hybrid.cluster.asking import Asked
from hybrid.cluster.prefixes import Prefix


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Lives in the process of a front. Ray counts the requests of replicas, and asks them if it does not know."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._affinity = Affinity()

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        """The replicas in order, each a rank of its own. The first is noted at once, so that a request that comes while
        this one is on its way knows of it.
        """
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        there = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queues = self.replica_queue_len_cache
        loads = {name: queues.get(replica.replica_id) or 0 for name, replica in there.items()}
        prefix = _prefix(pending_request)
        order = self._affinity.order(prefix, loads)
        if order:
            self._affinity.note(prefix, order[0])
        return [[there[name]] for name in order]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        self._affinity.note(_prefix(pending_request), replica_id.unique_id)

    def update_replicas(self, replicas: Any) -> None:
        super().update_replicas(replicas)
        self._affinity.keep({replica.replica_id.unique_id for replica in replicas})


def _prefix(pending_request: Any) -> Prefix:
    asked = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return asked.prefix if isinstance(asked, Asked) else Prefix()
