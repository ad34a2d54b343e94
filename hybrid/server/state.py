"""What the server says of itself: whether it lives and is ready, its model, its settings, its counters."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

import hybrid
from hybrid.server.fields import (
    MAX_MESSAGES,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
)
from hybrid.server.refusals import RETRY_SECONDS
from hybrid.server.service import Service
from hybrid.server.thinking import TEMPLATE_KWARGS


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        """Requests are taken: 200; else 503, with how far loading has come."""
        return _state(service)

    @router.get("/health", response_model=None)
    async def health() -> Response:
        """As /ready, for those who have a key."""
        return _state(service)

    @router.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        """The names of the model."""
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @router.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        return _model(service, service.check_model(name))

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters, in the form of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/info", response_model=None)
    async def info() -> dict[str, Any]:
        """The model, its plan, and the limits of requests."""
        return _info(service)

    return router


def _state(service: Service) -> Response:
    status = "ok"
    if service.draining:
        status = "shutting down"
    elif service.loading:
        status = "loading"
    elif service.health.failing:
        status = "a step of the engine has failed"
    facts: dict[str, Any] = {
        "status": status,
        "running": service.admission.running(),
        "waiting": service.admission.waiting(),
    }
    if service.loading and service.progress:
        what, done, total = service.progress
        facts["progress"] = {"what": what, "done": done, "total": total}
    headers = {} if service.ready else {"retry-after": str(RETRY_SECONDS)}
    return JSONResponse(facts, 200 if service.ready else 503, headers)


def _model(service: Service, name: str) -> dict[str, Any]:
    known = {"id": name, "object": "model", "created": service.created, "owned_by": "hybrid"}
    return known if service.loading else {**known, "max_model_len": service.llm.llm.max_tokens}


def _info(service: Service) -> dict[str, Any]:
    llm = service.llm.llm
    plan = llm.engine.plan
    return {
        "version": hybrid.__version__,
        "models": service.names,
        "description": llm.describe(),
        "isa": plan.isa,
        "threads": plan.threads,
        "sequences": plan.sequences,
        "max_model_len": llm.max_tokens,
        "kv_token_budget": plan.kv_token_budget,
        "expert_cache": llm.engine.experts is not None,
        "limits": {
            "queue": service.config.max_queue,
            "body_bytes": service.config.max_body_mb << 20,
            "n": MAX_N,
            "prompts": MAX_PROMPTS,
            "stop": MAX_STOPS,
            "stop_characters": MAX_STOP_LENGTH,
            "top_logprobs": MAX_TOP_LOGPROBS,
            "tools": MAX_TOOLS,
            "messages": MAX_MESSAGES,
        },
        "chat_template_kwargs": TEMPLATE_KWARGS,
    }
