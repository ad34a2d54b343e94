"""The whole application: endpoints, and what they answer where nothing else does."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

import hybrid
from hybrid.server import activity, cache, chat, completions, messages, ollama, page, responses, state, texts
from hybrid.server.gate import Gate
from hybrid.server.refusals import Refusal, internal
from hybrid.server.service import Service
from hybrid.server.stream import ClientGone

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "What cannot be, with an error that says why."},
    "5XX": {"description": "What cannot be now, with an error."},
}
_EMBEDDINGS = "this server makes texts, and no embeddings; ask another one for them"
_NOT_MADE = {
    "/embeddings": _EMBEDDINGS,
    "/embed": _EMBEDDINGS,
    "/rerank": "this server makes texts, and no ranks; ask another one for them",
}  # by the end of a path that clients know
_CLIENT_GONE = 499  # as nginx writes it; nobody reads it


def build(service: Service) -> Gate:
    """An ASGI application for clients."""
    return Gate(endpoints(service), service.config, service.telemetry)


def endpoints(service: Service) -> FastAPI:
    """What is behind the gate. Whatever a route raises becomes an error of the API's shape."""
    app = FastAPI(
        title="hybrid",
        version=hybrid.__version__,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    for endpoints in (chat, completions, messages, responses, ollama, texts, cache, activity, state):
        app.include_router(endpoints.routes(service))
    app.include_router(page.routes())
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else internal()
    return refusal.response(request.scope["path"])


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    path = request.scope["path"]
    message = {404: _nowhere(path), 405: "this endpoint takes another method"}.get(status, "not possible")
    response = Refusal(status, message).response(path)
    if isinstance(error, HTTPException):
        response.headers.update(error.headers or {})
    return response


def _nowhere(path: str) -> str:
    makes = next((what for name, what in _NOT_MADE.items() if path.rstrip("/").endswith(name)), None)
    return f"there is no such endpoint; {makes or 'GET /openapi.json describes those that there are'}"


async def _failed(request: Request, error: Exception) -> Response:
    return internal().response(request.scope["path"])
