"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hybrid.core import Completion, TextDelta, ToolCall
from hybrid.server.bodies import read_body
from hybrid.server.chat_tools import plain_choice
from hybrid.server.chunks import chunk_events
from hybrid.server.documented import EVENTS, takes
from hybrid.server.fields import ChatBody
from hybrid.server.prompt_logprobs import prompt_logprobs
from hybrid.server.replies import chat_logprobs, head, measured, note_usage, usage_of
from hybrid.server.service import Run, Service
from hybrid.server.stream import EventStream, until_gone
from hybrid.serving.async_llm import AsyncLLM
from hybrid.serving.intake import Intake
from hybrid.serving.request import Request as Job
from hybrid.text.messages import ChatInput


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=takes(ChatBody, EVENTS, service.names), response_model=None)
    async def chat_completions(request: Request) -> Response:
        """The assistant's answer to a conversation, whole or as a stream."""
        service.admission.require_room()
        body = await read_body(request, ChatBody, service.config.max_body_mb << 20)
        return await until_gone(request.receive, _answer(service, request, body))

    return router


async def _answer(service: Service, request: Request, body: ChatBody) -> Response:
    model = service.check_model(body.model)
    run = await start(service, body)
    if body.stream:
        events = _events(service, run, body, model, request)
        return EventStream(events, run.close)
    try:
        await run.finish()
        completions = [one.completion for one in run.requests]
        reply = head("chatcmpl", "chat.completion", model)
        reply["choices"] = [_choice(service, completion, body) for completion in completions]
        reply |= {"usage": usage_of(completions), **measured(run)}
        reply |= await prompt_logprobs(service, completions[0].prompt_token_ids, body)
        note_usage(request, run)
        return JSONResponse(reply)
    finally:
        run.close()


async def start(service: Service, body: ChatBody) -> Run:
    """Let a chat in, whichever API it was asked by. Raises Refusal."""
    body.check()
    return await service.start(body.n or 1, partial(_requests, body, service.vocab))


def prompt_tokens(intake: Intake, chat: ChatBody) -> list[int]:
    """The prompt that a chat makes. Raises Refusal and RequestError."""
    kwargs = chat.template_kwargs(intake.reads)
    return intake.encode_chat(ChatInput(intake.fitted(chat.plain_messages()), chat.offered_tools(), None, kwargs))


def _requests(body: ChatBody, vocab: int, llm: AsyncLLM) -> list[Job]:
    count = body.n or 1
    params = body.params_for(vocab)
    several = body.parallel_tool_calls is not False
    kwargs = body.template_kwargs(llm.intake.reads)
    messages, choice = llm.intake.fitted(body.plain_messages()), plain_choice(body.tool_choice)
    chat = ChatInput(messages, body.offered_tools(), None, kwargs, choice, several)
    return llm.intake.chat_samples(chat, replace(params, n=count), keep=True)


def _choice(service: Service, completion: Completion, body: ChatBody) -> dict[str, Any]:
    calls = _kept_calls(body, completion.tool_calls)
    message: dict[str, Any] = {"role": "assistant", "content": completion.text or (None if calls else "")}
    message["refusal"] = None
    if completion.reasoning and body.tells_reasoning:
        message["reasoning_content"] = completion.reasoning
    if calls:
        message["tool_calls"] = [body.call(call) for call in calls]
    logprobs = None if completion.logprobs is None else chat_logprobs(service.token_texts, completion.logprobs)
    return {
        "index": completion.sample,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": "tool_calls" if calls and completion.finish_reason == "stop" else completion.finish_reason,
    }


def _kept_calls(body: ChatBody, calls: list[ToolCall]) -> list[ToolCall]:
    return calls[:1] if body.parallel_tool_calls is False else calls


def _events(service: Service, run: Run, body: ChatBody, model: str, request: Request) -> AsyncIterator[bytes]:
    choices = [_Streamed(service, one.completion, body) for one in run.requests]
    first = [choice.chunk({"role": "assistant", "content": ""}) for choice in choices]
    top = head("chatcmpl", "chat.completion.chunk", model)
    return chunk_events(
        run, request, top, body.told_usage, first,
        lambda job, delta: choices[job.completion.sample].chunks(delta),
    )  # fmt: skip


@dataclass
class _Streamed:
    """One choice on its way."""

    service: Service
    completion: Completion
    body: ChatBody
    calls: int = 0
    told: int = 0  # tokens whose probabilities were sent

    def chunks(self, delta: TextDelta) -> list[dict[str, Any]]:
        """What a piece becomes; the last piece ends with the reason."""
        said: dict[str, Any] = {}
        if delta.reasoning and self.body.tells_reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.text:
            said["content"] = delta.text
        if calls := self._new_calls(delta):
            said["tool_calls"] = calls
        chunks = []
        logprobs = self._logprobs(delta)
        if said or logprobs:
            chunks.append(self.chunk(said, logprobs))
        if delta.finish_reason is not None:
            called = self.calls and delta.finish_reason == "stop"
            chunks.append({**self.chunk({}), "finish_reason": "tool_calls" if called else delta.finish_reason})
        return chunks

    def chunk(self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": self.completion.sample, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _new_calls(self, delta: TextDelta) -> list[dict[str, Any]]:
        calls = []
        for call in delta.tool_calls:
            if self.body.parallel_tool_calls is not False or not self.calls:
                calls.append({"index": self.calls, **self.body.call(call)})
                self.calls += 1
        return calls

    def _logprobs(self, delta: TextDelta) -> dict[str, Any] | None:
        if self.completion.logprobs is None or not delta.token_ids:
            return None
        first, self.told = self.told, self.told + len(delta.token_ids)
        return chat_logprobs(self.service.token_texts, self.completion.logprobs[first : self.told])
