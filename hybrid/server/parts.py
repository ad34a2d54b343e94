"""One answer of the assistant as the parts that every API of chats tells apart: reasoning, text and calls of tools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from hybrid.core import Completion, TextDelta, ToolCall
from hybrid.server.refusals import Refusal
from hybrid.server.replies import note_usage
from hybrid.server.service import Run
from hybrid.server.stream import EventStream, Opening, Silence, last_event


@dataclass(frozen=True)
class Part:
    """Text of a kind, or a whole call, whose arguments are its text."""

    kind: Literal["reasoning", "text", "call"]
    text: str
    call: ToolCall | None = None


class Face(ABC):
    """One answer as an API writes it. It is given the parts as they come, and knows the whole at the end.

    media: of a stream. one_call: whether calls after the first are left out. events: that were made, where the API
    counts them.
    """

    media: ClassVar[str] = "text/event-stream"
    events = 0

    def __init__(self, run: Run, model: str, one_call: bool = False) -> None:
        self.run, self.model, self._one_call, self.called = run, model, one_call, False

    @property
    def completion(self) -> Completion:
        return self.run.requests[0].completion

    @abstractmethod
    def begin(self) -> bytes:
        """How a stream begins."""

    @abstractmethod
    def add(self, part: Part) -> bytes:
        """What a part becomes in a stream."""

    @abstractmethod
    def end(self) -> bytes:
        """How a stream ends, after all parts."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The reply, after all parts and `end`."""

    @abstractmethod
    def silence(self) -> bytes:
        """What a stream says while there is nothing to say."""

    def parts(self, said: Completion | TextDelta) -> Iterator[Part]:
        if said.reasoning:
            yield Part("reasoning", said.reasoning)
        if said.text:
            yield Part("text", said.text)
        for call in said.tool_calls:
            if not (self.called and self._one_call):
                self.called = True
                yield Part("call", call.arguments, call)


async def answer(request: Request, run: Run, stream: bool, make: Callable[[Run], Face]) -> Response:
    """The reply of a run of one completion, whole or as a stream. Closes the run."""
    try:
        face = make(run)
        if not stream:
            await run.finish()
            for part in face.parts(face.completion):
                face.add(part)
            note_usage(request, run)
            face.end()
            run.close()
            return JSONResponse(face.whole())
    except BaseException:
        run.close()
        raise
    return EventStream(_events(request, face), run.close, face.media)


async def _events(request: Request, face: Face) -> AsyncIterator[bytes]:
    run = face.run
    if first := face.begin():
        yield Opening(first)
    while not run.over():
        try:
            pieces = await run.next(run.service.config.ping_seconds)
        except Refusal as refusal:
            yield last_event(request.url.path, refusal, face.events)
            return
        said = b"".join(face.add(part) for _, delta in pieces for part in face.parts(delta))
        if said or not pieces:
            yield said or Silence(face.silence())
    note_usage(request, run)
    yield face.end()
