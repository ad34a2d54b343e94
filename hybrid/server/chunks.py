"""A reply as a stream of chunks: what chats and completions share of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request

from hybrid.server.replies import measured, note_usage, usage_of
from hybrid.server.service import Run
from hybrid.server.stream import DONE, PING, Opening, event
from hybrid.serving.together import Piece

Choices = list[dict[str, Any]]


async def chunk_events(
    run: Run,
    request: Request,
    top: dict[str, Any],
    with_usage: bool,
    first: Sequence[dict[str, Any]],
    choices_of: Callable[[list[Piece]], Choices],
) -> AsyncIterator[bytes]:
    """Events whose data are a choice each: `first`, what pieces become as they come, and the end.

    top: what every chunk has besides. with_usage: whether a last chunk has the usage, and with it the timings.
    """
    if with_usage:
        top = {**top, "usage": None}
    if first:
        yield Opening(b"".join(event({**top, "choices": [choice]}) for choice in first))
    while not run.over():
        pieces = await run.next(run.service.config.ping_seconds)
        parts: list[dict[str, Any]] = [{**top, "choices": [choice]} for choice in choices_of(pieces)]
        if run.over() and not with_usage:
            parts[-1] |= measured(run)
        if parts or not pieces:
            yield b"".join(map(event, parts)) or PING
    note_usage(request, run)
    if with_usage:
        usage = usage_of([one.completion for one in run.requests])
        yield event({**top, "choices": [], "usage": usage, **measured(run)})
    yield DONE
