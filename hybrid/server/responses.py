"""POST /v1/responses, as OpenAI's API has it, without anything that is kept."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from functools import partial
from time import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hybrid.core import Completion, TextDelta
from hybrid.server.agent_tools import with_left_out
from hybrid.server.bodies import read_body
from hybrid.server.chat import prompt_tokens, start
from hybrid.server.documented import EVENTS, takes
from hybrid.server.parts import Face, Part, answer
from hybrid.server.refusals import INPUT_TOKENS, RESPONSES, Refusal
from hybrid.server.replies import measured, usage_of
from hybrid.server.responses_body import ResponsesBody
from hybrid.server.service import Run, Service
from hybrid.server.stream import PING, named_event, until_gone
from hybrid.server.text_logprobs import TextLogprobs

Item = dict[str, Any]
_WRITTEN = ("function_call", "custom_tool_call")  # calls whose input has events of its own


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(RESPONSES, openapi_extra=takes(ResponsesBody, EVENTS, service.names), response_model=None)
    async def responses(request: Request) -> Response:
        """The assistant's answer as items, whole or as a stream."""
        service.admission.require_room()
        body = await read_body(request, ResponsesBody, service.config.max_body_mb << 20)
        return await until_gone(request.receive, _answer(service, request, body))

    @router.post(INPUT_TOKENS, openapi_extra=takes(ResponsesBody, None, service.names), response_model=None)
    async def input_tokens(request: Request) -> Response:
        """How many tokens the prompt has that would be made."""
        with service.admission.text():
            body = await read_body(request, ResponsesBody, service.config.max_body_mb << 20)
            service.check_model(body.model)
            chat = body.chat_body()
            tokens = await service.prepare(partial(prompt_tokens, service.llm.intake, chat), text=True)
            return JSONResponse({"object": "response.input_tokens", "input_tokens": len(tokens)})

    @router.get("/v1/responses/{name}", response_model=None)
    async def response(name: str) -> Response:
        """Always 404: no response is kept."""
        raise Refusal(404, "this server keeps no responses", "id", "response_not_found")

    return router


async def _answer(service: Service, request: Request, body: ResponsesBody) -> Response:
    model = service.check_model(body.model)
    run = await start(service, body.chat_body())
    reply = await answer(request, run, bool(body.stream), partial(_Response, model=model, body=body))
    return with_left_out(reply, body.offered().left_out)


class _Response(Face):
    """A response: items that are reasoning, a message or a call of a function."""

    def __init__(self, run: Run, model: str, body: ResponsesBody) -> None:
        super().__init__(run, model, body.parallel_tool_calls is False)
        self._id, self._created, self._body = f"resp_{uuid.uuid4().hex}", time(), body
        self._offered = body.offered()
        self._items: list[Item] = []
        self._open: str | None = None  # the kind of the last item, while it goes on
        self._scored = TextLogprobs(run.service.token_texts, not body.stream) if body.tells_logprobs else None
        self._told = 0  # tokens that came

    def parts(self, said: Completion | TextDelta) -> Iterator[Part]:
        first, self._told = self._told, self._told + len(said.token_ids)
        if self._scored:
            self._scored.push((self.completion.logprobs or [])[first : self._told])
        return super().parts(said)

    def begin(self) -> bytes:
        whole = self._response("in_progress")
        return self._event("response.created", response=whole) + self._event("response.in_progress", response=whole)

    def add(self, part: Part) -> bytes:
        scored = self._scored.take(part) if self._scored else []
        if part.call:
            return self._close() + self._call(part)
        events = b""
        if part.kind != self._open:
            events = self._close() + self._start(part.kind)
        content = self._items[-1]["content"][0]
        content["text"] += part.text
        if part.kind == "text":
            content["logprobs"] += scored
        return events + self._inner(f"{_stem(part.kind)}.delta", delta=part.text, **_logprobs(part.kind, scored))

    def end(self) -> bytes:
        events = self._close(self._status)
        return events + self._event(f"response.{self._status}", response=self._finished())

    def whole(self) -> dict[str, Any]:
        return {**self._finished(), **measured(self.run)}

    def silence(self) -> bytes:
        return PING

    @property
    def _status(self) -> str:
        return "incomplete" if self.completion.finish_reason == "length" else "completed"

    def _start(self, kind: str) -> bytes:
        """An item whose text is to come."""
        self._open = kind
        if kind == "reasoning":
            item: Item = {"type": "reasoning", "id": _new("rs"), "summary": [], "content": []}
            part: Item = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": "message", "id": _new("msg"), "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items.append({**item, "status": "in_progress"})
        events = self._event("response.output_item.added", output_index=self._index, item=dict(self._items[-1]))
        self._items[-1]["content"] = [part]
        return events + self._inner("content_part.added", part=part)

    def _close(self, status: str = "completed") -> bytes:
        if self._open is None:
            return b""
        kind, self._open = self._open, None
        self._items[-1]["status"] = status
        part = self._items[-1]["content"][0]
        events = self._inner(f"{_stem(kind)}.done", text=part["text"], **_logprobs(kind, part.get("logprobs", [])))
        return events + self._inner("content_part.done", part=part) + self._item_done()

    def _call(self, part: Part) -> bytes:
        assert part.call
        item = self._offered.item(part.call)
        if item["type"] not in _WRITTEN:
            return self._call_at_once(item)
        custom = item["type"] == "custom_tool_call"
        field = "input" if custom else "arguments"
        item = {"id": _new("ctc" if custom else "fc"), **item, "status": "completed"}
        self._items.append({**item, field: "", "status": "in_progress"})
        place = {"item_id": item["id"], "output_index": self._index}
        events = self._event("response.output_item.added", output_index=self._index, item=dict(self._items[-1]))
        stem = "response.custom_tool_call_input" if custom else "response.function_call_arguments"
        events += self._event(f"{stem}.delta", **place, delta=item[field])
        named = {} if custom else {"name": item["name"]}
        events += self._event(f"{stem}.done", **place, **named, **{field: item[field]})
        self._items[-1] = item
        return events + self._item_done()

    def _call_at_once(self, item: Item) -> bytes:
        """One that has no events for its parts."""
        self._items.append({"id": _new(item["type"]), **item, "status": "completed"})
        events = self._event("response.output_item.added", output_index=self._index, item=self._items[-1])
        return events + self._item_done()

    def _item_done(self) -> bytes:
        return self._event("response.output_item.done", output_index=self._index, item=self._items[-1])

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _inner(self, kind: str, **more: Any) -> bytes:
        place = {"item_id": self._items[-1]["id"], "output_index": self._index, "content_index": 0}
        return self._event(f"response.{kind}", **place, **more)

    def _event(self, kind: str, **more: Any) -> bytes:
        number, self.events = self.events, self.events + 1
        return named_event({"type": kind, "sequence_number": number, **more})

    def _finished(self) -> dict[str, Any]:
        usage = usage_of([self.completion])
        reasoning = self.run.service.llm.llm.encode(self.completion.reasoning, False)
        made = self._response(self._status)
        done = max(time(), self._created)  # the clock may have been set back
        made["completed_at"] = int(done) if self._status == "completed" else None
        made["incomplete_details"] = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        made["output"] = self._items
        made["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": min(len(reasoning), usage["completion_tokens"])},
            "total_tokens": usage["total_tokens"],
        }
        return made

    def _response(self, status: str) -> dict[str, Any]:
        body = self._body
        said = body.model_dump(include={"instructions", "max_output_tokens", "metadata", "user", "max_tool_calls"})
        reasoning = body.reasoning or None
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(self._created),
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": [],
            **said,
            "metadata": body.metadata or {},
            "tools": self._offered.told,
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "top_logprobs": body.top_logprobs or 0,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "truncation": body.truncation or "disabled",
            "service_tier": "default",
            "previous_response_id": None,
            "background": False,
            "store": False,
            "safety_identifier": None,
            "prompt_cache_key": None,
            "usage": None,
        }


def _stem(kind: str) -> str:
    return "reasoning_text" if kind == "reasoning" else "output_text"


def _logprobs(kind: str, scored: list[dict[str, Any]]) -> dict[str, Any]:
    return {"logprobs": scored} if kind == "text" else {}


def _new(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
