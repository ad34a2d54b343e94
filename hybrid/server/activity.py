"""GET /activity: what the machine does just now, for whoever looks at it: experts, memory, queue.

What the engine's thread knows is asked between two steps, once for all who wait, and only while somebody looks. In a
step that is long, the prompt of a book, the answer is what was known before it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter

from hybrid.errors import HybridError
from hybrid.server.service import Service
from hybrid.serving.async_llm import AsyncLLM
from hybrid.serving.llm import LLM

_PATIENCE = 0.5  # seconds that are waited for the end of a step


def routes(service: Service) -> APIRouter:
    router, activity = APIRouter(), Activity(service)

    @router.get("/activity", response_model=None)
    async def now() -> dict[str, Any]:
        """Use of experts by layer, memory, queue and counters of tokens. `engine` is null until it was seen once."""
        return await activity.now()

    return router


class Activity:
    """On one event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._seen: dict[str, Any] | None = None
        self._look: asyncio.Task[None] | None = None
        self._looked_at: AsyncLLM | None = None

    async def now(self) -> dict[str, Any]:
        """Raises Refusal while there is no engine."""
        service = self._service
        plan = service.llm.llm.engine.plan
        if self._look is None or self._look.done() or self._looked_at is not service.llm:
            self._looked_at = service.llm  # another one, where the engine was opened anew
            self._look = asyncio.ensure_future(self._see())
        await asyncio.wait((self._look,), timeout=_PATIENCE)
        metrics = service.metrics
        return {
            "queue": {
                "running": service.admission.running(),
                "waiting": service.admission.waiting(),
                "sequences": plan.sequences,
                "limit": service.config.max_queue,
            },
            "rows": {"prompt": metrics.prompt_rows, "decode": metrics.decode_rows},
            "expert_cache": {"hits": metrics.expert_hits, "misses": metrics.expert_misses},
            "memory": {
                "weights": sum(plan.weight_bytes.values()),
                "kv_token_bytes": plan.kv.token_bytes,
                "kv_token_budget": plan.kv_token_budget,
            },
            "engine": self._seen,
        }

    async def _see(self) -> None:
        llm = self._service.llm
        with suppress(HybridError):  # it is closed; nothing is seen any more
            self._seen = await llm.run(lambda: _seen(llm.llm))


def _seen(llm: LLM) -> dict[str, Any]:
    """On the engine's thread, between steps."""
    engine, kept, pool = llm.engine, llm.loop.kept_lengths(), llm.loop.prefix_report()
    use, experts = engine.expert_use(), engine.experts
    return {
        "layers": list(engine.spec.moe_layers),
        "use": [] if use is None else use.tolist(),
        "resident": experts.table.resident() if experts and experts.placing else None,
        "running_tokens": llm.loop.running_tokens(),
        "kept_tokens": sum(kept),
        "kept": len(kept),
        "pool_tokens": pool.tokens,
        "pool_bytes": pool.bytes,
    }
