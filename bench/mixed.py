"""Connections to a server as clients of all kinds make them, those that leave it included.

Every API, whole or streamed; read to the end, dropped at any byte of the request or of the answer, reset, half closed,
pipelined, or read slowly. The same for the same seed.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from load import words

CHAT, COMPLETE, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES, OLLAMA_CHAT, OLLAMA = "/v1/responses", "/api/chat", "/api/generate"
PROMPTS = 12  # different ones
READ = 1 << 16
SLOW_READ, SLOW_SECONDS = 64, 0.002
WHOLE, DROPPED, RESET, HALF_CLOSED, SLOW = "whole", "dropped", "reset", "half closed", "slow"
LEAVING = (DROPPED, DROPPED, RESET, HALF_CLOSED, SLOW)
_CLOSED_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: a reset in place of an orderly end


@dataclass(frozen=True)
class Visit:
    """One connection. data: of the requests; sent: how many bytes of it are. taken: bytes of the answer that are read
    before the client leaves; a whole answer has no such limit.
    """

    path: str
    data: bytes
    manner: str
    sent: int
    taken: int


def asks(seed: int, limits: Sequence[int], model: str) -> list[tuple[str, dict[str, Any]]]:
    """(path, body) in each API, greedy, so that an answer is the same at all times. limits: of tokens, one is drawn."""
    found = []
    for number in range(PROMPTS):
        source = random.Random(f"{seed} {number}")
        text = words(source.choice((3, 20, 100, 400)), f"{seed} {number}")
        said = [{"role": "user", "content": text}]
        limit, named = source.choice(limits), {"model": model, "temperature": 0}
        options = {"model": model, "options": {"num_predict": limit, "temperature": 0}}
        found += [
            (CHAT, {"messages": said, "max_tokens": limit, "logprobs": number % 3 == 0, **named}),
            (COMPLETE, {"prompt": text, "max_tokens": limit, "logprobs": number % 4, "ignore_eos": True, **named}),
            (MESSAGES, {"messages": said, "max_tokens": limit, **named}),
            (RESPONSES, {"input": text, "max_output_tokens": limit, **named}),
            (OLLAMA_CHAT, {"messages": said, **options}),
            (OLLAMA, {"prompt": text, **options}),
        ]
    return [(path, {**body, "stream": stream}) for path, body in found for stream in (False, True)]


def request(path: str, body: dict[str, Any], last: bool = True) -> bytes:
    """As it is sent."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n" + "Connection: close\r\n" * last
    return head.encode() + b"\r\n" + data


def visits(seed: int, whole: float, model: str) -> Iterator[Visit]:
    """Endless. whole: the share of those that wait for their answers; all others leave at a place that is drawn."""
    source, awaited, left = random.Random(seed), asks(seed, (1, 8, 40), model), asks(seed, (400,), model)
    while True:
        stays = source.random() < whole
        path, body = source.choice(awaited if stays else left)
        data = request(path, body)
        if stays:
            yield Visit(path, data, WHOLE, len(data), 0)
            continue
        if source.random() < 0.1:  # another one behind it, before the first is answered
            data = request(path, body, last=False) + data
        manner = source.choice(LEAVING)
        early = manner in (DROPPED, RESET) and source.random() < 0.4
        yield Visit(
            path, data, manner, source.randrange(len(data)) if early else len(data),
            0 if early else source.choice((0, 1, 20, 400, 4000)),
        )  # fmt: skip


async def make(address: tuple[str, int], visit: Visit) -> bytes:
    """Make a visit; returns what was read of the answer."""
    connection = socket.socket()
    connection.setblocking(False)
    if visit.manner == SLOW:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(connection, address)
    reader, writer = await asyncio.open_connection(sock=connection, limit=READ)
    try:
        writer.write(visit.data[: visit.sent])
        await writer.drain()
        if visit.manner == HALF_CLOSED:
            writer.write_eof()
        if visit.manner == RESET:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSED_AT_ONCE)
        return await _read(reader, visit)
    except ConnectionError:  # it was refused before all of it was sent, or the half that was left is closed
        return b""
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def _read(reader: asyncio.StreamReader, visit: Visit) -> bytes:
    """An answer to its end, or as much of it as is taken."""
    answer = b""
    while visit.manner == WHOLE or len(answer) < visit.taken:
        slow = visit.manner == SLOW
        part = await reader.read(SLOW_READ if slow else READ)
        if not part:
            break
        answer += part
        await asyncio.sleep(SLOW_SECONDS * slow)
    return answer


def status(answer: bytes) -> int:
    """0: there is none."""
    found = answer[:12].partition(b" ")[2]
    return int(found) if found.isdigit() else 0


def said(answer: bytes) -> str:
    """All the text in an answer, whole or streamed, however it was cut into pieces."""
    body = answer.partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n")
    found: list[str] = []
    for line in body.split(b"\n"):
        with suppress(ValueError):  # the name of an event, the size of a chunk, the end
            _collect(json.loads(line.removeprefix(b"data: ")), found)
    return "".join(found)


def _collect(value: Any, found: list[str]) -> None:
    if isinstance(value, list):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        found += [text for name in ("text", "content", "response") if isinstance(text := value.get(name), str)]
        for item in value.values():
            _collect(item, found)


async def go_through(address: tuple[str, int], several: Sequence[Visit], at_once: int) -> list[bytes]:
    """Make all these visits, so many at once; returns what was read in each."""
    answers: list[bytes] = [b""] * len(several)
    left = iter(enumerate(several))

    async def visitor() -> None:
        for place, visit in left:
            answers[place] = await make(address, visit)

    await asyncio.gather(*(visitor() for _ in range(at_once)))
    return answers
