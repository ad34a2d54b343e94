"""GET /cache: what lies in the expert cache and what it did, and the prompts whose keys and values are kept."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from hybrid.errors import RequestError
from hybrid.server.refusals import Refusal
from hybrid.server.service import Service
from hybrid.serving.llm import LLM

if TYPE_CHECKING:
    from hybrid.engine.experts.runtime import DeviceExperts

_COUNTS = ("calls", "hits", "loading", "misses", "evictions", "fills")  # of `DeviceExperts.count`


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/cache", response_model=None)
    async def cache() -> dict[str, Any]:
        """The expert cache, null with a reason where there is none, and the kept prompts: sequences and pool."""
        llm = service.llm
        try:
            return await llm.run(lambda: _state(llm.llm))
        except RequestError as error:
            raise Refusal.of(error) from None

    return router


def _state(llm: LLM) -> dict[str, Any]:
    """On the engine's thread, between steps."""
    engine = llm.engine
    experts = _experts(engine.experts)
    lengths, pool = llm.loop.kept_lengths(), llm.loop.prefix_report()
    kept = {"sequences": len(lengths), "tokens": sum(lengths), "lengths": lengths}
    kept |= {"limit_sequences": engine.plan.sequences, "limit_tokens": engine.plan.kv_token_budget}
    reason = _reason(llm) if experts is None else None
    return {"experts": experts, "reason": reason, "kept": kept, "prefixes": asdict(pool)}


def _reason(llm: LLM) -> str:
    if not llm.engine.spec.moe_layers:
        return "this model has no experts"
    return "the processor computes all experts; --device puts some of them on another one"


def _experts(experts: DeviceExperts | None) -> dict[str, Any] | None:
    if experts is None:
        return None
    geometry, settings, counts = experts.geometry, experts.plan.settings, experts.count()
    layers = [
        {"layer": layer, **dict(zip(_COUNTS, map(int, row), strict=True))}
        for layer, row in zip(experts.plan.shape.layers, counts, strict=True)
    ]
    total = dict(zip(_COUNTS, map(int, counts.sum(axis=0)), strict=True))
    return {
        "active": experts.placing,
        "geometry": {
            "nblocks": geometry.nblocks,
            "nways": geometry.nways,
            "mapping": geometry.mapping,
            "slots": geometry.slots,
            "experts": geometry.experts,
            "layers": geometry.layers,
        },
        "slots_in_use": len(experts.table.resident()),
        "policy": settings.policy,
        "admission": settings.admission,
        "hit_rate": total["hits"] / max(1, total["calls"]),
        "total": total,
        "layers": layers,
    }
