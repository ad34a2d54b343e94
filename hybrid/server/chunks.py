"""A reply as a stream of chunks: what chats and completions share of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request

from hybrid.core import TextDelta
from hybrid.server.fields import StreamOptions
from hybrid.server.replies import measured, note_usage, usage_of
from hybrid.server.service import Run
from hybrid.server.stream import DONE, PING, Opening, Quiet, event
from hybrid.serving.request import Request as Job

Choices = list[dict[str, Any]]


async def chunk_events(
    run: Run,
    request: Request,
    top: dict[str, Any],
    told: StreamOptions,
    first: Sequence[dict[str, Any]],
    choices_of: Callable[[Job, TextDelta], Choices],
) -> AsyncIterator[bytes]:
    """Events whose data are a choice each: `first`, what each piece becomes as they come, and the end.

    top: what every chunk has besides. told: whether a last chunk has the usage, and with it the timings, and whether
    the others have what it is so far.
    """
    with_usage, quiet = told.include_usage, Quiet(run.service.config.ping_seconds)
    tokens = 0  # that the pieces so far have told of

    def usage() -> dict[str, Any]:
        return usage_of([one.completion for one in run.requests])

    def so_far() -> dict[str, Any]:
        known = usage()
        return {**known, "completion_tokens": tokens, "total_tokens": known["prompt_tokens"] + tokens}

    def chunk(choice: dict[str, Any]) -> dict[str, Any]:
        said = {**top, "choices": [choice]}
        return {**said, "usage": so_far() if told.continuous_usage_stats else None} if with_usage else said

    if first:
        yield Opening(b"".join(event(chunk(choice)) for choice in first))
    while not run.over():
        pieces = await run.next(run.service.config.ping_seconds)
        parts = []
        for job, delta in pieces:
            tokens += len(delta.token_ids)
            parts += [chunk(choice) for choice in choices_of(job, delta)]
        if run.over() and not with_usage:
            parts[-1] |= measured(run)
        if quiet.ends(parts, pieces):
            yield b"".join(map(event, parts)) or PING
    note_usage(request, run)
    if with_usage:
        yield event({**top, "choices": [], "usage": usage(), **measured(run)})
    yield DONE
