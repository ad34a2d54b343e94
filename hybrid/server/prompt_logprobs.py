"""How likely the tokens of a prompt are, as vLLM's `prompt_logprobs` tells it."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from hybrid.core import TokenLogprob
from hybrid.server.clients import CLIENT
from hybrid.server.numbers import WHOLE
from hybrid.server.replies import finite
from hybrid.server.service import Service
from hybrid.serving.async_llm import AsyncLLM
from hybrid.text.token_texts import TokenTexts

MAX_PROMPT_LOGPROBS = 20


class PromptScored(BaseModel):
    """The field, of endpoints that take it."""

    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_PROMPT_LOGPROBS), WHOLE] | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> PromptScored:
        if self.prompt_logprobs is not None and getattr(self, "stream", None):
            raise ValueError("prompt_logprobs: a stream has none; leave out one of the two")
        return self


async def prompt_logprobs(service: Service, tokens: list[int], body: PromptScored) -> dict[str, Any]:
    """What a reply has of it; nothing where it was not asked for. Raises Refusal."""
    if body.prompt_logprobs is None:
        return {}
    scores = await service.attempt(partial(score, tokens, body.prompt_logprobs))
    service.admission.charge(len(tokens))
    told = [None if one is None else _told(service.token_texts, one) for one in scores]
    return {"prompt_logprobs": told}


async def score(tokens: list[int], top: int, llm: AsyncLLM) -> list[TokenLogprob | None]:
    return await llm.score(tokens, top, client=CLIENT.get())


def _told(texts: TokenTexts, one: TokenLogprob) -> dict[str, Any]:
    """The likeliest tokens by their ids, and the token that stands there."""
    ranked = {token: (rank, logprob) for rank, (token, logprob) in enumerate(one.top, start=1)}
    ranked.setdefault(one.token_id, (one.rank, one.logprob))
    return {
        str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": texts.text_of(token)}
        for token, (rank, logprob) in ranked.items()
    }
