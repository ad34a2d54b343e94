"""The training text: stories, conversations and code, written by the grammars of this directory.

Deterministic: the same seed and count always give the same text. Nothing is downloaded or copied.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from multiprocessing import Pool

from dialogues import chat
from snippets import snippet
from stories import story

END = "<|endoftext|>"
MAKERS = {"story": story, "chat": chat, "code": snippet}
# Shares of documents; stories are the longest, so that they are about half of the tokens.
SHARES = {"story": 0.38, "chat": 0.48, "code": 0.14}
CHUNK = 1000


def document(rng: random.Random) -> str:
    """One document of a random domain, without the end marker."""
    domain = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
    return MAKERS[domain](rng)


def chunk(seed: int) -> list[str]:
    """A block of documents; seeding per block lets blocks be made in parallel."""
    rng = random.Random(seed)
    return [document(rng) for _ in range(CHUNK)]


def documents(count: int, seed: int = 0, processes: int = 2) -> Iterator[list[str]]:
    """Blocks of documents in a fixed order."""
    seeds = range(seed * 1_000_000, seed * 1_000_000 + -(-count // CHUNK))
    with Pool(processes) as pool:
        yield from pool.imap(chunk, seeds)


def main() -> None:
    """Prints a sample, so that one can read what the model reads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--domain", choices=list(MAKERS), default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.count):
        print((MAKERS[args.domain](rng) if args.domain else document(rng)) + END)


if __name__ == "__main__":
    main()
