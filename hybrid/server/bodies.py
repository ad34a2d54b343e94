"""What clients send: read within bounds, parsed strictly, checked against what an endpoint takes."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from hybrid.printable import printable
from hybrid.server.refusals import Refusal
from hybrid.server.strict import WHAT_INSTEAD

Body = TypeVar("Body", bound=BaseModel)
MAX_DEPTH = 64
_BODY_SECONDS = 60  # for all of a body to arrive
_SMALL = 1 << 16  # bytes that are parsed at once, on the event loop


async def read_body(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """The JSON body of a request as an endpoint takes it. Raises Refusal."""
    return checked(kind, await parse_object(await read_bytes(request, max_bytes)))


async def parse_object(data: bytes) -> dict[str, Any]:
    """What a body says. Raises Refusal."""
    value = _parse(data) if len(data) <= _SMALL else await asyncio.to_thread(_parse, data)
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object")
    return value


def checked(kind: type[Body], value: dict[str, Any]) -> Body:
    """What an endpoint takes. Raises Refusal by the name of the first field that is wrong."""
    try:
        return kind.model_validate(value, strict=True)
    except ValidationError as error:
        raise _refusal(error) from None


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The body of a request. Raises Refusal."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "a body must not be compressed")
    too_large = Refusal(413, f"the body is larger than {max_bytes} bytes, the limit of this server (--max-body-mb)")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {_BODY_SECONDS} s") from None
    except ClientDisconnect:
        raise Refusal(400, "the client left") from None
    return bytes(data)


def _parse(data: bytes) -> Any:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_object)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8") from None
    except ValueError:
        raise Refusal(400, "the body is not valid JSON") from None
    _check(value)
    return value


def _no_constant(name: str) -> Any:
    raise Refusal(400, f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise Refusal(400, "an object of the body has the same key twice")
    return made


def _check(value: Any) -> None:
    """Neither too deep, nor with a text that no UTF-8 can hold."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        following: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                following += item.keys()
                following += item.values()
            elif isinstance(item, list):
                following += item
        level = following
    raise _too_deep()


def _check_text(text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise Refusal(400, "a text of the body has a lone surrogate, which no UTF-8 text can hold") from None


def _too_deep() -> Refusal:
    return Refusal(400, f"the body is nested more than {MAX_DEPTH} deep")


def _refusal(error: ValidationError) -> Refusal:
    """The first thing that is wrong, by the name of its field."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"] if not (isinstance(part, str) and "[" in part))[:100]
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        instead = WHAT_INSTEAD.get(str(first["loc"][-1]))
        message = "this field is unknown here" + (f"; {instead}" if instead else "")
    return Refusal(400, printable(f"{place or 'the body'}: {message}")[:400], param=printable(place) or None)
