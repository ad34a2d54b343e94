"""Admission: which sequence a job gets, and what of its prompt is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid.formats.block import BLOCK
from hybrid.serving.kept import Kept, KeptSequences
from hybrid.serving.prefixes import Prefix, is_being_read, longest_prefix
from hybrid.serving.request import Job, Request

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine


class Admission:
    """Gives the sequences of an engine to jobs. running: the requests that have one, in order of admission, of whom
    the caller keeps the books. kept: the sequences that were left behind, which give way to whatever needs their place.
    """

    def __init__(self, engine: Engine) -> None:
        self.running: list[Request] = []
        self.kept = KeptSequences(engine.plan.kv.repeatable)
        self._engine = engine
        self._plan = engine.plan

    def can_fit(self, length: int) -> bool:
        """Whether there is room for so many tokens, if what was left behind gives way."""
        return len(self.running) < self._plan.sequences and self._reserved + length <= self._plan.kv_token_budget

    def look(self, job: Request) -> tuple[Prefix | None, bool]:
        """The longest beginning of a prompt that can be copied, and whether the request had better wait, because a
        prompt that begins as its own does is being read. Prompts are read in order of arrival, so that this delays
        nothing behind it either.
        """
        if not self._shares(job) or not self.kept.rewindable:
            return None, False
        prefix = longest_prefix(job, self.running, self.kept)
        return prefix, is_being_read(job, self.running, prefix.tokens if prefix else 0)

    def settle(self, job: Request, prefix: Prefix | None) -> None:
        """Give a request its sequence: one that was left behind with the beginning of its prompt, or a free one, which
        may get a copy of the prefix that `look` has found. The request runs from now on.
        """
        job.reserved = len(job.tokens)
        found = self.kept.find(job.prompt, job.phase) if self._shares(job) else None
        if prefix and self._can_keep(prefix, job) and (not found or _loses_more(*found, prefix)):
            if prefix.kept:
                self.kept.use(prefix.kept)
            sequence = self.free(job.reserved)
            self._engine.copy(prefix.sequence, sequence, prefix.tokens)
            job.sequence, job.computed = sequence, prefix.tokens
        elif found and self._make_room(job.reserved, found[0]):
            kept, job.computed = found
            self.kept.take(kept)
            job.sequence = kept.sequence
            job.reserved = max(job.reserved, len(kept.tokens))
        else:
            job.sequence = self.free(job.reserved)
        job.completion.cached_tokens = job.computed
        self.running.append(job)

    def free(self, length: int) -> int:
        """A sequence that nobody has, after what was left behind has given way to so many tokens."""
        self._make_room(length)
        used = {request.sequence for request in self.running} | self.kept.sequences
        return next(sequence for sequence in range(self._plan.sequences) if sequence not in used)

    def leave(self, job: Job, keeps: bool) -> None:
        """Take the sequence from a job. keeps: whether its state may stay for a prompt that begins as its tokens do."""
        assert job.sequence is not None
        sequence, job.sequence = job.sequence, None
        if isinstance(job, Request):
            self.running.remove(job)
            if keeps and job.keep and job.computed:
                return self.kept.put(Kept(sequence, job.tokens[: job.computed].copy(), len(job.prompt), job.phase))
        self._engine.release(sequence)

    def forget(self) -> None:
        """Free the sequences that were left behind."""
        while kept := self.kept.pop_oldest():
            self._engine.release(kept.sequence)

    @property
    def _reserved(self) -> int:
        """Tokens that the running requests may come to."""
        return sum(request.reserved for request in self.running)

    def _make_room(self, length: int, besides: Kept | None = None) -> bool:
        """Have what was left behind give way to so many tokens, the sequence `besides` last; returns whether it
        stays.
        """
        more = max(length - len(besides.tokens), 0) if besides else length
        places = self._plan.sequences - len(self.running) - (besides is None)
        while len(self.kept) > places or self._reserved + self.kept.tokens + more > self._plan.kv_token_budget:
            oldest = self.kept.pop_oldest(besides)
            if oldest is None:
                break
            self._engine.release(oldest.sequence)
        else:
            return besides is not None
        if besides:
            self.kept.take(besides)
            self._engine.release(besides.sequence)
        return False

    def _shares(self, job: Request) -> bool:
        return job.keep and not (self._engine.routes and self._engine.routes.matter)

    def _can_keep(self, prefix: Prefix, job: Request) -> bool:
        """Whether what a request would copy need not give way to it."""
        if prefix.kept is None:
            return True
        room = len(self.running) + 2 <= self._plan.sequences
        return room and self._reserved + len(prefix.kept.tokens) + job.reserved <= self._plan.kv_token_budget


def _loses_more(kept: Kept, shared: int, prefix: Prefix) -> bool:
    """Whether going on with a kept sequence saves less than a copy would, or destroys a part of its prompt."""
    return shared < prefix.tokens or shared + BLOCK < kept.prompt
