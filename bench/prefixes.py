"""Prompt tokens that are computed for a recorded load, beside a perfect prefix cache of the same memory.

usage: python bench/prefixes.py mooncake_conversation.jsonl [--memory 100000,1000000] [--places 16,256]

The file has a line a request, {"input_length": tokens, "hash_ids": [a number for each 512 tokens]}, as Mooncake
publishes its traces. The requests go one after another through the project's own scheduler, with an engine that
computes nothing; 512 tokens of the file are 256 here, a node of the pool, so that all lengths and memories are halved.
The perfect cache stores a block once, whoever uses it, and gives up the one that was used longest ago. The memory is
that of the sequences and of the pool of kept prompts together; --no-pool leaves the sequences alone.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from hybrid.core import Batch, SamplingParams, StepResult, StepTimes
from hybrid.serving.pool import NODE_TOKENS
from hybrid.serving.request import Request
from hybrid.serving.scheduler import Scheduler

HASHED = 512  # tokens of the file with one number
SCALE = HASHED // NODE_TOKENS


@dataclass(frozen=True)
class CountedTokens:
    """What `Engine.save` returns, of which only the size is known: a byte a token."""

    nbytes: int

    def part(self, start: int, stop: int) -> CountedTokens:
        return CountedTokens(stop - start)


@dataclass
class CountingEngine:
    """What a scheduler needs of an engine; counts rows. places: sequences. tokens: of keys and values, in all.
    pool: whether prompts are kept beyond the sequences.
    """

    places: int
    tokens: int
    vocab: int
    pool: bool
    computed: int = 0
    routes: None = None
    spec: Any = field(init=False)
    plan: Any = field(init=False)

    def __post_init__(self) -> None:
        self.spec = SimpleNamespace(vocab=self.vocab, length_phase=lambda length: 0)
        self.plan = SimpleNamespace(
            sequences=self.places,
            kv_token_budget=self.tokens,
            max_seq_len=self.tokens,
            max_rows=8192,
            speculate=False,
            kv_idle_release=None,
            min_free_bytes=0,
            prefix_dir=None,
            max_itl=None,
            cache=None,
            state_bytes=self.tokens,
            prefix_bytes=self.tokens * self.pool,
            kv=SimpleNamespace(repeatable=True, token_bytes=1, fixed_bytes=0),
        )
        self._logits = np.zeros((1, self.vocab), np.float32)

    def forward(self, batch: Batch) -> StepResult:
        self.computed += len(batch.token_ids)
        return StepResult(self._logits[: len(batch.logit_rows)], StepTimes(0.0, 0.0, 0.0, 0.0, 0.0, 0.0))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Nothing is stored."""

    def step_bytes(self, rows: int) -> float:
        return 1.0 + rows

    @property
    def kv(self) -> CountingEngine:
        """As `KvArena`, too."""
        return self

    def save(self, sequence: int, start: int, stop: int) -> CountedTokens:
        return CountedTokens(stop - start)

    def load(self, saved: CountedTokens, sequence: int, start: int, tokens: int) -> None:
        """Nothing is stored."""

    def release(self, sequence: int) -> None:
        """Nothing is stored."""


def prompts_of(path: Path) -> list[np.ndarray]:
    """A prompt a line: its block's number for every token."""
    prompts = []
    for line in path.read_text().splitlines():
        request = json.loads(line)
        tokens = np.repeat(np.array(request["hash_ids"], np.int32), NODE_TOKENS)
        prompts.append(tokens[: max(1, -(-request["input_length"] // SCALE))])
    return prompts


def ours(prompts: list[np.ndarray], memory: int, places: int, pool: bool) -> int:
    vocab = 1 + max(int(prompt.max()) for prompt in prompts)
    engine = CountingEngine(places, memory, vocab, pool)
    scheduler = Scheduler(cast(Any, engine))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    for prompt in prompts:
        scheduler.add(Request(prompt, params, keep=True))
        while scheduler.has_work:
            for job in scheduler.step():
                if job.error:
                    raise job.error
    return engine.computed


def perfect(prompts: list[np.ndarray], memory: int) -> int:
    cached: OrderedDict[int, None] = OrderedDict()
    computed = 0
    for prompt in prompts:
        blocks = prompt[: len(prompt) // NODE_TOKENS * NODE_TOKENS : NODE_TOKENS].tolist()
        known = next((i for i, block in enumerate(blocks) if block not in cached), len(blocks))
        computed += max(1, len(prompt) - known * NODE_TOKENS)
        for block in reversed(blocks):  # a beginning stays longer than what follows it
            cached[block] = None
            cached.move_to_end(block)
        while len(cached) > memory // NODE_TOKENS:
            cached.popitem(last=False)
    return computed


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--memory", type=numbers, default=[200_000, 1_000_000, 3_000_000], help="tokens of the file")
    parser.add_argument("--places", type=numbers, default=[8, 64, 512], help="sequences (--max-batch)")
    parser.add_argument("--pool", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    prompts = prompts_of(options.trace)
    total = sum(map(len, prompts)) * SCALE
    print(f"{len(prompts)} prompts, {total / 1e6:.1f} M tokens\n")
    print("| memory, tokens | perfect, M |" + "".join(f" {places} sequences |" for places in options.places))
    print("|---:|---:|" + "---:|" * len(options.places))
    for memory in options.memory:
        best = perfect(prompts, memory // SCALE)
        cells = [ours(prompts, memory // SCALE, places, options.pool) / best - 1 for places in options.places]
        print(f"| {memory:,} | {best * SCALE / 1e6:.2f} |" + "".join(f" {cell:+.2%} |" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
