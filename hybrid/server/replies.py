"""What replies share: usage, timings, the probabilities of tokens."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from time import time
from typing import Any

from fastapi import Request

from hybrid.core import Completion, TokenLogprob
from hybrid.server.service import Run
from hybrid.server.stream import exchange_of
from hybrid.text.token_texts import TokenTexts


def head(kind: str, object: str, model: str) -> dict[str, Any]:
    """How a reply begins; kind: the first part of its id."""
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": object, "created": int(time()), "model": model}


def usage_of(completions: Sequence[Completion]) -> dict[str, Any]:
    """A prompt counts once, however many completions it has."""
    firsts = [completion.usage for completion in completions if completion.sample == 0]
    prompt = sum(usage.prompt_tokens for usage in firsts)
    produced = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": produced,
        "total_tokens": prompt + produced,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
    }


def note_usage(request: Request, run: Run) -> None:
    """For the line about it in the log, and its span."""
    completions, exchange = [one.completion for one in run.requests], exchange_of(request)
    usage, made = usage_of(completions), run.requests[0].made
    exchange.tokens = (usage["prompt_tokens"], usage["completion_tokens"])
    exchange.moments = (made, *(made + moment for moment in _moments(completions)))


def measured(run: Run) -> dict[str, Any]:
    """Timings in milliseconds, and what the expert cache did."""
    completions = [request.completion for request in run.requests]
    usage = usage_of(completions)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    read, produced = usage["prompt_tokens"] - cached, usage["completion_tokens"]
    started, first, finished = _moments(completions)
    later = max(produced - len(completions), 0)
    return {
        "timings": {
            "queue_ms": round(1e3 * started, 3),
            "cache_n": cached,
            "prompt_n": read,
            "prompt_ms": round(1e3 * (first - started), 3),
            "prompt_per_second": _rate(read, first - started),
            "predicted_n": produced,
            "predicted_ms": round(1e3 * (finished - first), 3),
            "predicted_per_second": _rate(later, finished - first),
        },
        "expert_cache": run.expert_cache(),
    }


def _moments(completions: Sequence[Completion]) -> tuple[float, float, float]:
    """When the first prompt began to be computed, all had a first token, the last had ended: seconds since they were
    made.
    """
    started = min((c.times.started for c in completions if c.times.started is not None), default=0.0)
    first = max((c.times.first_token for c in completions if c.times.first_token is not None), default=started)
    finished = max((c.times.finished for c in completions if c.times.finished is not None), default=first)
    return started, first, finished


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if seconds > 0 else None


def chat_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": token_logprobs(texts, tokens), "refusal": None}


def token_logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Of each token, with the likeliest at its place."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = texts.bytes_of(token)
        return {"token": texts.text_of(token), "logprob": finite(logprob), "bytes": list(raw)}

    return [
        {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}
        for token in tokens
    ]


def completion_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], tokens: Sequence[TokenLogprob | None], offset: int = 0
) -> dict[str, Any]:
    """offset: characters of the text before the first of these."""
    written = [texts.text_of(token) for token in token_ids]
    offsets = []
    for text in written:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": written,
        "token_logprobs": [None if token is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [None if token is None else _top(texts, token) for token in tokens],
        "text_offset": offsets,
    }


def _top(texts: TokenTexts, token: TokenLogprob) -> dict[str, float]:
    """The likeliest first; of tokens that are written alike, the likelier. The token itself is there too."""
    found: dict[str, float] = {}
    for other, logprob in (*token.top, (token.token_id, token.logprob)):
        found.setdefault(texts.text_of(other), finite(logprob))
    return found


def finite(logprob: float) -> float:
    """JSON knows no infinity: what is impossible is very unlikely."""
    return max(float(logprob), -9999.0)


def stopped_by(text: str, stops: Sequence[str]) -> str | None:
    """Which stop text ended an answer, whose whole text with it this is: the one that was complete first."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return min(found)[2] if found else None
