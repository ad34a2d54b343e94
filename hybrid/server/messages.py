"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's API has them."""

from __future__ import annotations

import json
import uuid
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hybrid.server.agent_tools import with_left_out
from hybrid.server.bodies import checked, read_body
from hybrid.server.chat import prompt_tokens, start
from hybrid.server.documented import EVENTS, takes
from hybrid.server.fields import ChatBody
from hybrid.server.messages_body import CountBody, MessagesBody
from hybrid.server.parts import Face, Part, answer
from hybrid.server.replies import measured, stopped_by, usage_of
from hybrid.server.service import Run, Service
from hybrid.server.stream import named_event, until_gone


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    max_bytes = service.config.max_body_mb << 20

    @router.post("/v1/messages", openapi_extra=takes(MessagesBody, EVENTS, service.names), response_model=None)
    async def messages(request: Request) -> Response:
        """The assistant's next message, whole or as a stream."""
        service.admission.require_room()
        body = await read_body(request, MessagesBody, max_bytes)
        return await until_gone(request.receive, _answer(service, request, body))

    @router.post("/v1/messages/count_tokens", openapi_extra=takes(CountBody, None, service.names), response_model=None)
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt has that would be made."""
        with service.admission.text():
            body = await read_body(request, CountBody, max_bytes)
            service.check_model(body.model)
            chat = checked(ChatBody, body.chat())
            tokens = await service.prepare(partial(prompt_tokens, service.llm.intake, chat), text=True)
            return JSONResponse({"input_tokens": len(tokens)})

    return router


async def _answer(service: Service, request: Request, body: MessagesBody) -> Response:
    model = service.check_model(body.model)
    chat = body.chat_body()
    run = await start(service, chat)
    make = partial(_Message, model=model, stops=body.stop_sequences or [], chat=chat)
    return with_left_out(await answer(request, run, bool(body.stream), make), body.left_out())


class _Message(Face):
    """A message: blocks of thinking, text and uses of tools."""

    def __init__(self, run: Run, model: str, stops: list[str], chat: ChatBody) -> None:
        super().__init__(run, model, chat.parallel_tool_calls is False)
        self._id, self._stops = f"msg_{uuid.uuid4().hex}", stops
        self._blocks: list[dict[str, Any]] = []
        self._open: str | None = None  # the kind of the last block, while it goes on

    def begin(self) -> bytes:
        tokens = {"input_tokens": len(self.completion.prompt_token_ids), "output_tokens": 0}
        return named_event({"type": "message_start", "message": self._message(None, None, tokens)})

    def add(self, part: Part) -> bytes:
        if part.call:
            return self._close() + self._call(part)
        events = b""
        if part.kind != self._open:
            events = self._close()
            self._open = part.kind
            thinking = part.kind == "reasoning"
            events += self._start(
                {"type": "thinking", "thinking": "", "signature": ""} if thinking else {"type": "text", "text": ""}
            )
        name = "thinking" if part.kind == "reasoning" else "text"
        self._blocks[-1][name] += part.text
        return events + self._delta({"type": f"{name}_delta", name: part.text})

    def end(self) -> bytes:
        reason, stop = self._reason()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        events = [self._close(), named_event({"type": "message_delta", "delta": delta, "usage": self._usage()})]
        return b"".join([*events, named_event({"type": "message_stop"})])

    def whole(self) -> dict[str, Any]:
        return {**self._message(*self._reason(), self._usage()), **measured(self.run)}

    def silence(self) -> bytes:
        return named_event({"type": "ping"})

    def _call(self, part: Part) -> bytes:
        assert part.call
        try:
            given = json.loads(part.text or "{}")
        except ValueError:
            given = None
        block = {"type": "tool_use", "id": part.call.id, "name": part.call.name, "input": {}}
        events = self._start(dict(block)) + self._delta({"type": "input_json_delta", "partial_json": part.text})
        self._blocks[-1] = {**block, "input": given if isinstance(given, dict) else {"arguments": part.text}}
        self._open = "call"
        return events + self._close()

    def _start(self, block: dict[str, Any]) -> bytes:
        self._blocks.append(block)
        return self._event("content_block_start", content_block=dict(block))

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return self._event("content_block_delta", delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return self._event("content_block_stop")

    def _event(self, kind: str, **more: Any) -> bytes:
        return named_event({"type": kind, "index": len(self._blocks) - 1, **more})

    def _reason(self) -> tuple[str, str | None]:
        if self.completion.finish_reason == "length":
            return "max_tokens", None
        if self.called:
            return "tool_use", None
        stop = stopped_by(self.run.service.llm.llm.decode(self.completion.token_ids), self._stops)
        return ("stop_sequence", stop) if stop else ("end_turn", None)

    def _usage(self) -> dict[str, Any]:
        """Tokens of the prompt that were computed before are not in input_tokens."""
        usage = usage_of([self.completion])
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }

    def _message(self, reason: str | None, stop: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [] if reason is None else self._blocks,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }
