"""Prompts that begin alike: whose keys and values a request takes over or copies, instead of computing them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hybrid.formats.block import BLOCK
from hybrid.serving.kept import Kept, Tokens, shared_tokens
from hybrid.serving.request import Job


@dataclass(frozen=True)
class Prefix:
    """The first `tokens` tokens of a prompt, which a sequence holds: whole blocks of keys. kept: what else holds it."""

    sequence: int
    tokens: int
    kept: Kept | None = None


def longest_prefix(job: Job, running: Iterable[Job], kept: Iterable[Kept]) -> Prefix | None:
    """The longest beginning of its tokens that can be copied now; None if that is less than a block."""
    found = [
        Prefix(other.sequence, _blocks(other.tokens[: other.computed], job.known))
        for other in running
        if other.sequence is not None and other.phase == job.phase
    ]
    found += [
        Prefix(other.sequence, _blocks(other.tokens, job.known), other) for other in kept if other.phase == job.phase
    ]
    best = max(found, key=lambda prefix: prefix.tokens, default=None)
    return best if best and best.tokens else None


def reader_of(job: Job, running: Iterable[Job], known: int, rewindable: bool) -> Job | None:
    """Who is reading a prompt that begins as the tokens of a job do, so that more than the `known` first of them will
    be there soon; None if nobody does. rewindable: of the state of a sequence; else it is saved at the marks of the
    other prompt alone.
    """
    coming = _blocks_to_come if rewindable else _mark_to_come
    reading = (other for other in running if other.computed < len(other.prompt) and other.phase == job.phase)
    return next((other for other in reading if coming(other, job) > known), None)


def _blocks_to_come(other: Job, job: Job) -> int:
    return _blocks(other.prompt, job.known)


def _mark_to_come(other: Job, job: Job) -> int:
    shared = shared_tokens(other.prompt, job.known)
    return max((mark for mark in other.marks if other.computed < mark <= shared), default=0)


def _blocks(known: Tokens, prompt: Tokens) -> int:
    return shared_tokens(known, prompt) // BLOCK * BLOCK
