"""POST /tokenize, /detokenize and /apply-template."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hybrid.server.bodies import read_body
from hybrid.server.documented import takes
from hybrid.server.fields import DetokenizeBody, TemplateBody, TokenizeBody
from hybrid.server.refusals import INPUT_TOKENS, Refusal
from hybrid.server.service import Service
from hybrid.serving.async_llm import AsyncLLM
from hybrid.serving.llm import LLM
from hybrid.text.messages import ChatInput
from hybrid.text.token_texts import TokenTexts

# Which compute nothing.
TEXT_PATHS = {"/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens", INPUT_TOKENS, "/api/show"}


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    max_bytes = service.config.max_body_mb << 20

    @router.post("/tokenize", openapi_extra=takes(TokenizeBody, None, service.names), response_model=None)
    async def tokenize(request: Request) -> Response:
        """A text as token ids."""
        with service.admission.text():
            body = await read_body(request, TokenizeBody, max_bytes)
            service.check_model(body.model)
            text = body.content if body.prompt is None else body.prompt
            if text is None or (body.content is not None and body.prompt is not None):
                raise Refusal(400, "give the text as 'content', or as 'prompt'", param="content")
            llm, texts = service.llm.llm, service.token_texts if body.with_pieces else None
            tokens = await service.prepare(lambda: _tokens(llm, texts, text, body.add_special_tokens), text=True)
            found = {"tokens": tokens, "count": len(tokens), "max_model_len": llm.max_tokens}
            return JSONResponse(found)

    @router.post("/detokenize", openapi_extra=takes(DetokenizeBody, None, service.names), response_model=None)
    async def detokenize(request: Request) -> Response:
        """The text of token ids, without that of special tokens."""
        with service.admission.text():
            body = await read_body(request, DetokenizeBody, max_bytes)
            service.check_model(body.model)
            llm = service.llm.llm
            text = await service.prepare(lambda: llm.decode(body.tokens), text=True)
            return JSONResponse({"content": text, "prompt": text})

    @router.post("/apply-template", openapi_extra=takes(TemplateBody, None, service.names), response_model=None)
    async def apply_template(request: Request) -> Response:
        """Messages as the prompt that the model would get."""
        with service.admission.text():
            body = await read_body(request, TemplateBody, max_bytes)
            service.check_model(body.model)
            llm = service.llm
            prompt = await service.prepare(lambda: _render(llm, body), text=True)
            return JSONResponse({"prompt": prompt})

    return router


def _tokens(llm: LLM, texts: TokenTexts | None, text: str, special: bool) -> list[Any]:
    """Ids, or objects that have the text of each token too."""
    tokens = llm.encode(text, special)
    return [{"id": token, "piece": texts.text_of(token)} for token in tokens] if texts else tokens


def _render(llm: AsyncLLM, body: TemplateBody) -> str:
    kwargs = body.template_kwargs(llm.intake.reads)
    return llm.intake.chat_prompt(ChatInput(llm.intake.fitted(body.plain_messages()), body.given_tools(), None, kwargs))
