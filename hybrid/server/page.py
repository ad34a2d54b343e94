"""The web page: files as they lie in `hybrid/assets/page`, which any browser may fetch; they hold nothing of anybody.

Everything that the page asks for needs a key where there is one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

FOLDER = Path(__file__).parent.parent / "assets" / "page"
INDEX = "index.html"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PATHS = {file.name: "/" if file.name == INDEX else f"/page/{file.name}" for file in sorted(FOLDER.iterdir())}
PATHS = frozenset(_PATHS.values())  # as they are sent, literally
# Nothing but files of this server runs or is shown, no text becomes markup, and no other page holds this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    tag: str  # changes with the content

    def response(self, request: Request) -> Response:
        headers = _HEADERS | {"etag": self.tag}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def routes() -> APIRouter:
    router = APIRouter()
    files = {name: _read(FOLDER / name) for name in _PATHS}

    @router.head("/", include_in_schema=False)
    @router.get("/", response_model=None, include_in_schema=False)
    async def root(request: Request) -> Response:
        """The page for browsers; clients of Ollama's API only ask whether anybody is there."""
        if "text/html" not in request.headers.get("accept", ""):
            return PlainTextResponse("hybrid is running\n", headers={"vary": "accept"})
        response = files[INDEX].response(request)
        response.headers["vary"] = "accept"
        return response

    def add(name: str, file: _File) -> None:
        async def send(request: Request) -> Response:
            return file.response(request)

        router.add_api_route(_PATHS[name], send, methods=["GET"], response_model=None, include_in_schema=False)

    for name, file in files.items():
        if name != INDEX:
            add(name, file)
    return router


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
