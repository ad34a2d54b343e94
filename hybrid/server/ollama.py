"""The API of Ollama's clients: chats and completions as lines of JSON, and what there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

import hybrid
from hybrid.core import Completion, SamplingParams, TextDelta
from hybrid.server.bodies import read_body
from hybrid.server.chat import start
from hybrid.server.documented import LINES, takes
from hybrid.server.ollama_body import OllamaBody, OllamaChatBody, OllamaGenerateBody, ShowBody
from hybrid.server.parts import Face, Part, answer
from hybrid.server.replies import measured, token_logprobs
from hybrid.server.service import Run, Service
from hybrid.server.stream import line, until_gone
from hybrid.serving.async_llm import AsyncLLM
from hybrid.serving.request import Request as Job

_LATEST = ":latest"  # what clients add to a name


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    max_bytes = service.config.max_body_mb << 20
    names = [name + end for name in service.names for end in ("", _LATEST)]

    @router.post("/api/chat", openapi_extra=takes(OllamaChatBody, LINES, names), response_model=None)
    async def chat(request: Request) -> Response:
        """The assistant's next message, as lines of JSON unless `stream` is false."""
        service.admission.require_room()
        body = await read_body(request, OllamaChatBody, max_bytes)
        return await until_gone(request.receive, _chat(service, request, body))

    @router.post("/api/generate", openapi_extra=takes(OllamaGenerateBody, LINES, names), response_model=None)
    async def generate(request: Request) -> Response:
        """The answer to a prompt, as lines of JSON unless `stream` is false."""
        service.admission.require_room()
        body = await read_body(request, OllamaGenerateBody, max_bytes)
        return await until_gone(request.receive, _generate(service, request, body))

    @router.post("/api/show", openapi_extra=takes(ShowBody, None, names), response_model=None)
    async def show(request: Request) -> Response:
        """What the model is."""
        with service.admission.text():
            body = await read_body(request, ShowBody, max_bytes)
            _check_model(service, body.model or body.name)
            return JSONResponse(_shown(service))

    @router.get("/api/tags", response_model=None)
    async def tags() -> dict[str, Any]:
        """The names of the model."""
        return {"models": [] if service.loading else [_model(service, name) for name in service.names]}

    @router.get("/api/ps", response_model=None)
    async def loaded() -> dict[str, Any]:
        """The same: what there is, is loaded."""
        if service.loading:
            return {"models": []}
        more = {"size_vram": 0, "context_length": service.llm.llm.max_tokens, "expires_at": _NEVER}
        return {"models": [{**_model(service, name), **more} for name in service.names]}

    @router.get("/api/version", response_model=None)
    async def version() -> dict[str, str]:
        return {"version": hybrid.__version__}

    return router


_NEVER = "9999-12-31T23:59:59Z"


async def _chat(service: Service, request: Request, body: OllamaChatBody) -> Response:
    _check_model(service, body.model)
    if not body.messages:
        return JSONResponse(_nothing_asked(body, {"message": {"role": "assistant", "content": ""}}))
    run = await start(service, body.chat_body())
    return await answer(request, run, body.stream is not False, partial(_Chat, model=body.model))


async def _generate(service: Service, request: Request, body: OllamaGenerateBody) -> Response:
    _check_model(service, body.model)
    if not body.prompt:
        return JSONResponse(_nothing_asked(body, {"response": ""}))
    chat = body.chat_body()
    if body.raw:
        chat.check()
        run = await service.start(1, partial(_continued, body.prompt, chat.params_for(service.vocab)))
    else:
        run = await start(service, chat)
    return await answer(request, run, body.stream is not False, partial(_Generated, model=body.model))


def _continued(prompt: str, params: SamplingParams, llm: AsyncLLM) -> list[Job]:
    return llm.intake.requests([prompt], params)


def _nothing_asked(body: OllamaBody, said: dict[str, Any]) -> dict[str, Any]:
    """Clients have a model loaded that way, or let go of; it is always loaded."""
    return {"model": body.model, "created_at": _now(), **said, "done": True, "done_reason": "load"}


def _check_model(service: Service, name: str | None) -> None:
    service.check_model(name.removesuffix(_LATEST) if name else name)


class _Lines(Face):
    """Lines, each with what came, and a last one with times in nanoseconds."""

    media: ClassVar[str] = "application/x-ndjson"

    def __init__(self, run: Run, model: str) -> None:
        super().__init__(run, model)
        self._said: dict[str, Any] = {}
        self._told = self._come = 0  # tokens whose probabilities were written, and those that have come

    def parts(self, said: Completion | TextDelta) -> Iterator[Part]:
        self._come += len(said.token_ids)
        yield from super().parts(said)

    def said(self, part: Part | None, message: dict[str, Any]) -> dict[str, Any]:
        """A message as this endpoint has it. part: the only thing that it says, None for the whole."""
        return {"message": {"role": "assistant", **message}}

    def begin(self) -> bytes:
        return b""

    def add(self, part: Part) -> bytes:
        message: dict[str, Any] = {"content": ""}
        if part.call:
            call = _call(part)
            message["tool_calls"] = [call]
            self._said.setdefault("tool_calls", []).append(call)
        else:
            name = "thinking" if part.kind == "reasoning" else "content"
            message[name] = part.text
            self._said[name] = self._said.get(name, "") + part.text
        return self._line(self.said(part, message))

    def end(self) -> bytes:
        return line(self._last({"content": ""}, self._logprobs()))

    def whole(self) -> dict[str, Any]:
        self._told = 0
        return self._last({"content": "", **self._said}, self._logprobs())

    def silence(self) -> bytes:
        return self._line(self.said(None, {"content": ""}))

    def _line(self, said: dict[str, Any]) -> bytes:
        return line({"model": self.model, "created_at": _now(), **said, "done": False, **self._logprobs()})

    def _logprobs(self) -> dict[str, Any]:
        """Of tokens that have come since the last line. A token may have no text yet, or none of its own."""
        logprobs, told, self._told = self.completion.logprobs, self._told, self._come
        if logprobs is None or told == self._come:
            return {}
        return {"logprobs": token_logprobs(self.run.service.token_texts, logprobs[told : self._come])}

    def _last(self, message: dict[str, Any], logprobs: dict[str, Any]) -> dict[str, Any]:
        times = measured(self.run)["timings"]
        reason = "length" if self.completion.finish_reason == "length" else "stop"
        top = {"model": self.model, "created_at": _now(), **self.said(None, message), "done": True}
        return {
            **top,
            "done_reason": reason,
            "total_duration": _ns(times["queue_ms"] + times["prompt_ms"] + times["predicted_ms"]),
            "load_duration": _ns(times["queue_ms"]),
            "prompt_eval_count": len(self.completion.prompt_token_ids),
            "prompt_eval_duration": _ns(times["prompt_ms"]),
            "eval_count": len(self.completion.token_ids),
            "eval_duration": _ns(times["predicted_ms"]),
            **logprobs,
        }


class _Chat(_Lines):
    """Of /api/chat."""


class _Generated(_Lines):
    """Of /api/generate, which offers no tools."""

    def said(self, part: Part | None, message: dict[str, Any]) -> dict[str, Any]:
        made = {"response": message["content"]}
        return {**made, "thinking": message["thinking"]} if "thinking" in message else made


def _call(part: Part) -> dict[str, Any]:
    assert part.call
    try:
        arguments = json.loads(part.text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        arguments = {"arguments": part.text}
    return {"id": part.call.id, "function": {"name": part.call.name, "arguments": arguments}}


def _ns(milliseconds: float) -> int:
    return max(0, round(1e6 * milliseconds))


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _model(service: Service, name: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z")
    size = sum(service.llm.llm.engine.plan.weight_bytes.values())
    known = {"name": name, "model": name, "modified_at": created, "size": size, "digest": ""}
    return {**known, "details": _details(service)}


def _details(service: Service) -> dict[str, Any]:
    engine = service.llm.llm.engine
    family = engine.spec.model_type
    more = {"parameter_size": "", "quantization_level": engine.plan.format_text}
    return {"parent_model": "", "format": "", "family": family, "families": [family], **more}


def _shown(service: Service) -> dict[str, Any]:
    llm = service.llm.llm
    spec = llm.engine.spec
    family = spec.model_type
    info = {
        "general.architecture": family,
        f"{family}.context_length": llm.max_tokens,
        f"{family}.embedding_length": spec.hidden,
        f"{family}.block_count": len(spec.layers),
        f"{family}.vocab_size": spec.vocab,
    }
    answers = service.llm.intake.answers
    capabilities = ["completion"]
    capabilities += ["tools"] if answers.dialect or answers.harmony else []
    capabilities += ["thinking"] if answers.reasoning or answers.harmony else []
    return {
        "modified_at": _model(service, service.names[0])["modified_at"],
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(service),
        "model_info": info,
        "capabilities": capabilities,
    }
