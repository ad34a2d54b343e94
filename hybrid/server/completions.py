"""POST /v1/completions: prompts continued, and with `echo` and `logprobs` scored, as evaluation harnesses want it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hybrid.core import Completion, TextDelta, TokenLogprob
from hybrid.server.bodies import read_body
from hybrid.server.chunks import chunk_events
from hybrid.server.documented import EVENTS, takes
from hybrid.server.fields import CompletionBody
from hybrid.server.numbers import ALL
from hybrid.server.prompt_logprobs import prompt_logprobs, score
from hybrid.server.replies import completion_logprobs, head, measured, note_usage, usage_of
from hybrid.server.service import Run, Service
from hybrid.server.stream import EventStream, until_gone
from hybrid.serving.async_llm import AsyncLLM
from hybrid.serving.request import Request as Job

DEFAULT_TOKENS = 16  # what OpenAI's API continues a prompt by


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=takes(CompletionBody, EVENTS, service.names), response_model=None)
    async def completions(request: Request) -> Response:
        """Prompts continued, whole or as a stream."""
        service.admission.require_room()
        body = await read_body(request, CompletionBody, service.config.max_body_mb << 20)
        return await until_gone(request.receive, _answer(service, request, body))

    return router


async def _answer(service: Service, request: Request, body: CompletionBody) -> Response:
    model = service.check_model(body.model)
    prompts = body.prompts()
    run = await service.start(len(prompts) * (body.n or 1), partial(_requests, body, prompts, service.vocab))
    try:
        echoes = await _echoes(service, run, body)
        if not body.stream:
            await run.finish()
            choices = [_Choice(service, one.completion, body, echoes) for one in run.requests]
            reply = head("cmpl", "text_completion", model)
            scored: dict[int, dict[str, Any]] = {}
            for one in run.requests:
                if one.completion.sample == 0:
                    tokens = one.completion.prompt_token_ids
                    scored[one.completion.index] = await prompt_logprobs(service, tokens, body)
            reply["choices"] = [{**choice.whole(), **scored[choice.completion.index]} for choice in choices]
            reply |= {"usage": usage_of([one.completion for one in run.requests]), **measured(run)}
            note_usage(request, run)
            run.close()
            return JSONResponse(reply)
    except BaseException:
        run.close()
        raise
    return EventStream(_events(service, run, body, model, echoes, request), run.close)


def _requests(body: CompletionBody, prompts: Sequence[str | list[int]], vocab: int, llm: AsyncLLM) -> list[Job]:
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    limit = llm.llm.max_tokens if limit == ALL else limit
    params = replace(body.params(vocab, limit, body.logprobs), n=body.n or 1)
    requests = llm.intake.requests(prompts, params)
    for request in requests:
        request.keep = True
    return requests


@dataclass(frozen=True)
class _Echo:
    """A prompt as it is given back: its text, and how likely its tokens were."""

    text: str
    logprobs: dict[str, Any] | None


async def _echoes(service: Service, run: Run, body: CompletionBody) -> dict[int, _Echo]:
    """By the index of the prompt; nothing where no echo was asked for."""
    found: dict[int, _Echo] = {}
    for completion in (one.completion for one in run.requests if body.echo):
        if completion.index in found:
            continue
        tokens = completion.prompt_token_ids
        text = service.llm.llm.decode(tokens) if completion.prompt is None else completion.prompt
        logprobs = None
        if body.logprobs is not None:
            scores = await service.attempt(partial(score, tokens, body.logprobs))
            service.admission.charge(len(tokens))
            logprobs = completion_logprobs(service.token_texts, tokens, scores)
        found[completion.index] = _Echo(text, logprobs)
    return found


@dataclass
class _Choice:
    """One completion of one prompt, as the reply has it."""

    service: Service
    completion: Completion
    body: CompletionBody
    echoes: dict[int, _Echo]
    told: int = 0  # tokens that were sent

    @property
    def index(self) -> int:
        return self.completion.index * (self.body.n or 1) + self.completion.sample

    @property
    def echo(self) -> _Echo:
        return self.echoes.get(self.completion.index, _Echo("", None))

    def whole(self) -> dict[str, Any]:
        made = self._logprobs(len(self.completion.token_ids))
        if made and self.echo.logprobs:
            made = {name: self.echo.logprobs[name] + made[name] for name in made}
        return self._said(self.echo.text + self.completion.text, made, self.completion.finish_reason)

    def first(self) -> dict[str, Any]:
        return self._said(self.echo.text, self.echo.logprobs, None)

    def chunk(self, delta: TextDelta) -> dict[str, Any]:
        return self._said(delta.text, self._logprobs(len(delta.token_ids)), delta.finish_reason)

    def _said(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, count: int) -> dict[str, Any] | None:
        """Of the next so many tokens."""
        known: list[TokenLogprob] | None = self.completion.logprobs
        if known is None:
            return None
        texts, first = self.service.token_texts, self.told
        self.told += count
        before = len(self.echo.text) + sum(len(texts.text_of(token)) for token in self.completion.token_ids[:first])
        return completion_logprobs(
            texts, self.completion.token_ids[first : self.told], known[first : self.told], before
        )


def _events(
    service: Service, run: Run, body: CompletionBody, model: str, echoes: dict[int, _Echo], request: Request
) -> AsyncIterator[bytes]:
    choices = {id(one): _Choice(service, one.completion, body, echoes) for one in run.requests}
    first = [choice.first() for choice in choices.values()] if echoes else []
    top = head("cmpl", "text_completion", model)
    return chunk_events(
        run, request, top, body.told_usage, first,
        lambda job, delta: [choices[id(job)].chunk(delta)],
    )  # fmt: skip
