"""What users of a server see under load: seconds to the first token, between tokens, to the last, and tokens a second.

usage: python bench/serve.py hybrid=http://127.0.0.1:8000 llama.cpp=http://127.0.0.1:8080 --users 16 --requests 64

Any server that streams OpenAI's /v1/completions can be asked; several are asked in turn, round after round, each alone
with the machine. The load is closed (--users, each asks again when it has its answer), of arrivals at random (--rate),
or recorded (--trace, of Mooncake or Azure: arrivals, lengths, and what prompts share).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from load import Answer, Ask, Server, arriving, closed, equal_asks, poisson, recorded

from hybrid.commands.tables import markdown
from hybrid.errors import HybridError

COLUMNS = ("server", "asked", "failed", "tokens/s", "good/s", "first p50", "p90", "p99", "gap p50", "p90", "p99",
           "whole p50", "p99", "cached", "outside")  # fmt: skip


@dataclass
class Measured:
    """Of one server, over all rounds. seconds: from the first request of a round to its last answer; kernels: of these,
    those in which they computed, None where the server does not tell.
    """

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    kernels: float | None = 0.0

    def add(self, answers: Sequence[Answer], kernels: float | None) -> None:
        self.answers += answers
        self.kernels = None if self.kernels is None or kernels is None else self.kernels + kernels
        self.seconds += max(answer.ended for answer in answers) - min(answer.sent for answer in answers)

    def summary(self, first: float, gap: float) -> dict[str, Any]:
        """Seconds and rates. good_per_second: answers within the limits of the first token and of the gaps; outside:
        seconds of a token in which no kernel computed.
        """
        whole = [answer for answer in self.answers if not answer.error]
        prompt = sum(answer.prompt_tokens for answer in whole)
        tokens = sum(answer.tokens for answer in whole)
        return {
            "asked": len(self.answers),
            "failed": len(self.answers) - len(whole),
            "errors": sorted({answer.error for answer in self.answers if answer.error}),
            "tokens_per_second": tokens / self.seconds,
            "good_per_second": sum(answer.within(first, gap) for answer in whole) / self.seconds,
            "first": _percentiles([answer.pieces[0] for answer in whole if answer.pieces]),
            "gap": _percentiles([gap for answer in whole for gap in answer.gaps]),
            "whole": _percentiles([answer.ended - answer.sent for answer in whole]),
            "prompt_tokens": prompt,
            "cached_share": sum(answer.cached for answer in whole) / prompt if prompt else None,
            "outside": None if self.kernels is None or not tokens else (self.seconds - self.kernels) / tokens,
        }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}


async def measure(options: argparse.Namespace) -> dict[str, Measured]:
    found = {name: Measured() for name, _ in options.servers}
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), headers=_headers(options)) as client:
        servers = {}
        for name, url in options.servers:
            model = options.model or await Server(url, client, {}).model()
            servers[name] = Server(url, client, {"model": model, **options.body})
        for server in servers.values():  # its pages, its threads
            await closed(server, equal_asks(options.warm, 16, 4, 0, -1), options.warm)
        for turn in range(options.rounds):
            asks = asks_of(options, turn)
            for name, server in servers.items():
                print(f"round {turn + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                timed = bool(options.rate or options.trace)
                run = arriving(server, asks) if timed else closed(server, asks, options.users)
                before = await server.engine_seconds()
                answers = await run
                after = await server.engine_seconds()
                found[name].add(answers, None if before is None or after is None else after - before)
    return found


def asks_of(options: argparse.Namespace, turn: int) -> list[Ask]:
    if options.trace:
        return recorded(options.trace, options.requests, options.scale, options.speed)
    asks = equal_asks(options.requests, options.prompt, options.answer, options.shared, turn)
    return poisson(asks, options.rate, turn) if options.rate else asks


def rows_of(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [
        [
            name, str(one["asked"]), str(one["failed"]), f"{one['tokens_per_second']:.1f}",
            f"{one['good_per_second']:.2f}", *_milliseconds(one["first"], "p50", "p90", "p99"),
            *_milliseconds(one["gap"], "p50", "p90", "p99"), *_milliseconds(one["whole"], "p50", "p99"),
            "-" if one["cached_share"] is None else f"{one['cached_share']:.0%}",
            "-" if one["outside"] is None else f"{one['outside'] * 1000:.2f} ms",
        ]
        for name, one in found.items()
    ]  # fmt: skip


def _milliseconds(values: dict[str, float] | None, *names: str) -> list[str]:
    return ["-" if values is None else f"{values[name] * 1000:.0f} ms" for name in names]


def _headers(options: argparse.Namespace) -> dict[str, str]:
    return {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}


def _server(text: str) -> tuple[str, str]:
    name, _, url = text.rpartition("=") if "=http" in text else ("server", "", text)
    if not url.startswith("http"):
        raise argparse.ArgumentTypeError(f"{text!r} is no server; write NAME=http://HOST:PORT")
    return name, url


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("servers", nargs="+", type=_server, metavar="[NAME=]URL")
    add("--requests", type=int, default=64, help="in each round (64)")
    add("--rounds", type=int, default=3, help="(3)")
    add("--users", type=int, default=16, help="of a closed load (16)")
    add("--rate", type=float, help="requests a second, arriving at random")
    add("--trace", type=Path, help="a recorded load: of Mooncake (.jsonl) or Azure (.csv)")
    add("--scale", type=float, default=1.0, help="by which recorded lengths are divided (1)")
    add("--speed", type=float, default=1.0, help="of recorded time (1)")
    add("--prompt", type=int, default=128, help="words of a prompt (128)")
    add("--shared", type=int, default=0, help="of them, the first that all prompts share (0)")
    add("--answer", type=int, default=64, help="tokens of an answer at most (64)")
    add("--first-limit", type=float, default=2.0, help="seconds to the first token that are good (2)")
    add("--gap-limit", type=float, default=0.2, help="seconds between tokens that are good, on average (0.2)")
    add("--model", help="the first that a server offers")
    add("--api-key")
    add(
        "--body",
        type=json.loads,
        default={"ignore_eos": True},
        help='JSON that every request has ({"ignore_eos": true})',
    )
    add("--warm", type=int, default=2, help="requests before the first round (2)")
    add("--output", type=Path, help="the results as JSON, too")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        measured = asyncio.run(measure(options))
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    found = {name: one.summary(options.first_limit, options.gap_limit) for name, one in measured.items()}
    print("\n".join(markdown(COLUMNS, rows_of(found), [True] + [False] * (len(COLUMNS) - 1))))
    for name, one in found.items():
        for error in one["errors"]:
            print(f"{name}: {error}")
    if options.output:
        options.output.write_text(json.dumps({"load": vars(options) | {"trace": str(options.trace)}, "results": found},
                                             indent=1, default=str) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
