"""Prompts that begin alike: whose keys and values a request takes over or copies, instead of computing them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hybrid.formats.block import BLOCK
from hybrid.serving.kept import Kept, Tokens, shared_tokens
from hybrid.serving.request import Request


@dataclass(frozen=True)
class Prefix:
    """The first `tokens` tokens of a prompt, which a sequence holds: whole blocks of keys. kept: what else holds it."""

    sequence: int
    tokens: int
    kept: Kept | None = None


def longest_prefix(job: Request, running: Iterable[Request], kept: Iterable[Kept]) -> Prefix | None:
    """The longest beginning of a prompt that can be copied now; None if that is less than a block."""
    found = [
        Prefix(other.sequence, _blocks(other.tokens[: other.computed], job.prompt))
        for other in running
        if other.sequence is not None and other.phase == job.phase
    ]
    found += [
        Prefix(other.sequence, _blocks(other.tokens, job.prompt), other) for other in kept if other.phase == job.phase
    ]
    best = max(found, key=lambda prefix: prefix.tokens, default=None)
    return best if best and best.tokens else None


def is_being_read(job: Request, running: Iterable[Request], known: int, rewindable: bool) -> bool:
    """Whether more than the `known` first tokens of a prompt will be there soon: another prompt that begins with them
    is being read. rewindable: of the state of a sequence; else it is saved at the marks of the other prompt alone.
    """
    coming = _blocks_to_come if rewindable else _mark_to_come
    reading = (other for other in running if other.computed < len(other.prompt) and other.phase == job.phase)
    return any(coming(other, job) > known for other in reading)


def _blocks_to_come(other: Request, job: Request) -> int:
    return _blocks(other.prompt, job.prompt)


def _mark_to_come(other: Request, job: Request) -> int:
    shared = shared_tokens(other.prompt, job.prompt)
    return max((mark for mark in other.marks if other.computed < mark <= shared), default=0)


def _blocks(known: Tokens, prompt: Tokens) -> int:
    return shared_tokens(known, prompt) // BLOCK * BLOCK
