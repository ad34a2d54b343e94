"""A load on a server that speaks OpenAI's API: what is asked and when, and what comes back when."""

from __future__ import annotations

import asyncio
import csv
import json
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from hybrid.errors import ConfigError

# Of one token each in about every vocabulary, with the space before.
COMMON = (
    "the of and to in is that for it as was with on be by not he this are or his from at which but have an had they "
    "you were their one all we can her has there been if more when will would who so no out up into do any time"
)
WORDS = COMMON.split()
HASHED = 512  # tokens behind each number of a trace of Mooncake
PATIENCE = 3600.0  # seconds that a reply may take


@dataclass(frozen=True)
class Ask:
    """at: seconds from the start of the load, where requests arrive by themselves."""

    prompt: str
    max_tokens: int
    at: float = 0.0


@dataclass
class Answer:
    """pieces: when each piece of the text came, in seconds since the request was sent. Counts are the server's; where
    it tells none there are as many tokens as pieces.
    """

    sent: float
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    cached: int = 0
    error: str = ""

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]

    def within(self, first: float, gap: float) -> bool:
        """Whether it came as promptly as somebody wants it: the first piece, and the pieces behind it on average."""
        if self.error or not self.pieces or self.pieces[0] > first:
            return False
        return len(self.pieces) == 1 or (self.pieces[-1] - self.pieces[0]) / (len(self.pieces) - 1) <= gap


def words(count: int, seed: object) -> str:
    """The same for the same seed."""
    chosen = random.Random(str(seed)).choices(WORDS, k=count)
    return "".join(f" {word}" for word in chosen)


def equal_asks(count: int, prompt: int, answer: int, shared: int, seed: int) -> list[Ask]:
    """Prompts of `prompt` words, of which the first `shared` are those of all others too."""
    first = words(shared, f"{seed} shared")
    return [Ask(first + words(prompt - shared, f"{seed} {i}"), answer) for i in range(count)]


def poisson(asks: Sequence[Ask], rate: float, seed: int) -> list[Ask]:
    """The same, arriving at random, `rate` a second."""
    source, at, found = random.Random(seed), 0.0, []
    for ask in asks:
        at += source.expovariate(rate)
        found.append(Ask(ask.prompt, ask.max_tokens, at))
    return found


def recorded(path: Path, count: int, scale: float, speed: float) -> list[Ask]:
    """The first requests of a trace of Mooncake (.jsonl) or Azure (.csv). Lengths are divided by `scale`, and time runs
    `speed` times as fast. Raises ConfigError for another file.
    """
    reader = _mooncake if path.suffix == ".jsonl" else _azure
    try:
        return list(islice(reader(path, scale, speed), count))
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: {type(error).__name__} {error}; it must be a trace of Mooncake (.jsonl) or of Azure (.csv)"
        ) from None


def _mooncake(path: Path, scale: float, speed: float) -> Iterator[Ask]:
    with path.open() as lines:
        for line in lines:
            entry = json.loads(line)
            text = "".join(words(_scaled(HASHED, scale), number) for number in entry["hash_ids"])
            prompt = " ".join(text.split()[: _scaled(entry["input_length"], scale)])
            yield Ask(f" {prompt}", _scaled(entry["output_length"], scale), entry["timestamp"] / 1000 / speed)


def _azure(path: Path, scale: float, speed: float) -> Iterator[Ask]:
    with path.open(newline="") as lines:
        first = None
        for number, row in enumerate(csv.DictReader(lines)):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            first = first or at
            prompt = words(_scaled(int(row["ContextTokens"]), scale), number)
            seconds = (at - first).total_seconds() / speed
            yield Ask(prompt, _scaled(int(row["GeneratedTokens"]), scale), seconds)


def _scaled(tokens: int, scale: float) -> int:
    return max(1, round(tokens / scale))


async def closed(server: Server, asks: Sequence[Ask], users: int) -> list[Answer]:
    """Each of `users` asks again as soon as it has its answer."""
    left, answers = iter(asks), []

    async def user() -> None:
        for ask in left:
            answers.append(await server.answer(ask))

    await asyncio.gather(*(user() for _ in range(users)))
    return answers


async def arriving(server: Server, asks: Sequence[Ask]) -> list[Answer]:
    """Each is sent at its time, whatever has become of those before."""
    start = time.perf_counter()

    async def one(ask: Ask) -> Answer:
        await asyncio.sleep(max(0.0, start + ask.at - time.perf_counter()))
        return await server.answer(ask)

    return list(await asyncio.gather(*map(one, asks)))


class Server:
    """url: of a server, without /v1. body: what every request says besides."""

    def __init__(self, url: str, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self._url, self._client, self._body = url.rstrip("/"), client, body

    async def model(self) -> str:
        """The first that it offers. Raises ConfigError where there is no such server."""
        try:
            reply = await self._client.get(f"{self._url}/v1/models")
            return str(reply.raise_for_status().json()["data"][0]["id"])
        except (httpx.HTTPError, KeyError, ValueError, IndexError) as error:
            raise ConfigError(f"{self._url} is no server that speaks OpenAI's API: {error}") from None

    async def engine_seconds(self) -> float | None:
        """Seconds that its kernels have computed; None for a server that does not tell."""
        try:
            lines = (await self._client.get(f"{self._url}/metrics")).text.splitlines()
        except httpx.HTTPError:
            return None
        return next((float(line.split()[1]) for line in lines if line.startswith("hybrid_engine_seconds_total ")), None)

    async def answer(self, ask: Ask) -> Answer:
        body = {
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._body,
        }
        answer = Answer(time.perf_counter())
        try:
            async with self._client.stream("POST", f"{self._url}/v1/completions", json=body, timeout=PATIENCE) as reply:
                if reply.status_code != 200:
                    answer.error = f"{reply.status_code} {(await reply.aread()).decode(errors='replace'):.200}"
                else:
                    await _read(reply.aiter_lines(), answer)
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__} {error}"
        answer.ended = time.perf_counter()
        answer.tokens = answer.tokens or len(answer.pieces)
        return answer


async def _read(lines: AsyncIterator[str], answer: Answer) -> None:
    async for line in lines:
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = str(event["error"])
        if any(choice.get("text") for choice in event.get("choices") or ()):
            answer.pieces.append(time.perf_counter() - answer.sent)
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.tokens = usage["prompt_tokens"], usage["completion_tokens"]
            answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
