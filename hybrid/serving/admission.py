"""Admission: which sequence a job gets, and what of its prompt is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid.formats.block import BLOCK
from hybrid.serving.kept import Kept, KeptSequences, Tokens
from hybrid.serving.marks import marks_of, state_spacing
from hybrid.serving.pool import Pooled, PrefixPool
from hybrid.serving.prefixes import Prefix, is_being_read, longest_prefix
from hybrid.serving.request import Job, Request

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine


class Admission:
    """Gives the sequences of an engine to jobs. running: the requests that have one, in order of admission, of whom
    the caller keeps the books. kept: the sequences that were left behind, which give way to whatever needs their place.
    pool: what they hold, too, and what those that gave way have held.
    """

    def __init__(self, engine: Engine) -> None:
        self.running: list[Request] = []
        self.kept = KeptSequences(engine.plan.kv.repeatable)
        self.pool = PrefixPool(engine)
        self._spacing = state_spacing(engine.plan.kv)
        self._engine = engine
        self._plan = engine.plan

    def can_fit(self, length: int) -> bool:
        """Whether there is room for so many tokens, if what was left behind gives way."""
        return len(self.running) < self._plan.sequences and self._reserved + length <= self._plan.kv_token_budget

    def look(self, job: Request) -> tuple[Prefix | Pooled | None, bool]:
        """The longest beginning of a prompt that can be copied, and whether the request had better wait, because a
        prompt that begins as its own does is being read. Prompts are read in order of arrival, so that this delays
        nothing behind it either.
        """
        if not self._shares(job):
            return None, False
        pooled = self.pool.find(job.prompt, job.phase)
        prefix = longest_prefix(job, self.running, self.kept) if self.kept.rewindable else None
        longest = pooled if pooled and (prefix is None or pooled.tokens > prefix.tokens) else prefix
        known = longest.tokens if longest else 0
        return longest, is_being_read(job, self.running, known, self.kept.rewindable)

    def settle(self, job: Request, prefix: Prefix | Pooled | None) -> None:
        """Give a request its sequence: one that was left behind with the beginning of its prompt, or a free one, which
        may get a copy of the prefix that `look` has found. The request runs from now on.
        """
        job.reserved = len(job.tokens)
        found = self.kept.find(job.prompt, job.phase) if self._shares(job) else None
        if prefix and self._can_keep(prefix, job) and (not found or _loses_more(*found, prefix)):
            job.sequence, job.computed = self._copied(prefix, job.reserved), prefix.tokens
        elif found and self._make_room(job.reserved, found[0]):
            kept, job.computed = found
            self.kept.take(kept)
            job.sequence = kept.sequence
            job.reserved = max(job.reserved, len(kept.tokens))
        else:
            job.sequence = self.free(job.reserved)
        job.completion.cached_tokens = job.saved = job.computed
        if self._saves_states(job):
            job.marks = marks_of(job.prompt, job.openings)
        self.running.append(job)

    def _copied(self, prefix: Prefix | Pooled, length: int) -> int:
        """A free sequence with room for so many tokens, which begins with a prefix."""
        if isinstance(prefix, Pooled):
            self.pool.touch(prefix)
            sequence = self.free(length)
            self.pool.load(prefix, sequence)
            return sequence
        if prefix.kept:
            self.kept.use(prefix.kept)
        sequence = self.free(length, prefix.kept)
        self._engine.copy(prefix.sequence, sequence, prefix.tokens)
        return sequence

    def free(self, length: int, source: Kept | None = None) -> int:
        """A sequence that nobody has, after what was left behind has given way to so many tokens. source: what is to be
        copied, for which there is room, too.
        """
        self._make_room(length, source=source)
        used = {request.sequence for request in self.running} | self.kept.sequences
        return next(sequence for sequence in range(self._plan.sequences) if sequence not in used)

    def leave(self, job: Job, keeps: bool) -> None:
        """Take the sequence from a job. keeps: whether its state may stay for a prompt that begins as its tokens do."""
        assert job.sequence is not None
        sequence, job.sequence = job.sequence, None
        if isinstance(job, Request):
            self.running.remove(job)
            if keeps and job.keep and job.computed:
                tokens = job.tokens[: job.computed].copy()
                self._save(sequence, tokens, job.phase, len(tokens))
                return self.kept.put(Kept(sequence, tokens, len(job.prompt), job.phase))
        self._engine.release(sequence)

    def save_marked(self, job: Request) -> None:
        """`save` where a request has come to one of its marks, or far from the last state of its prompt."""
        far = job.computed < len(job.prompt) and job.computed - job.saved >= self._spacing
        if far or job.computed in job.marks:
            self.save(job)

    def save(self, job: Request) -> None:
        """Keep the state of a running request, if it is one that later tokens change."""
        if self._saves_states(job) and job.sequence is not None:
            self._save(job.sequence, job.tokens[: job.computed], job.phase, 0)
            job.saved = job.computed

    def _save(self, sequence: int, tokens: Tokens, phase: int, more: int) -> None:
        """Have the pool keep what a sequence holds after these tokens. Sequences that were left behind give way first:
        the pool has what they have. more: tokens that the sequence has beyond the reserved ones of requests.
        """
        wanted = min(self.pool.limit, self.pool.nbytes + self.pool.cost(tokens, phase))
        while self._pool_room(more) < wanted and self._give_up_oldest():
            pass
        self.pool.put(sequence, tokens, phase, self._pool_room(more))

    def _pool_room(self, more: int) -> int:
        """Bytes that the pool may have if the sequences come to hold so many tokens more."""
        tokens = self._reserved + self.kept.tokens + more
        return min(self.pool.limit, self._plan.state_bytes - tokens * self._plan.kv.token_bytes)

    def forget(self) -> None:
        """Free what was left behind."""
        while self._give_up_oldest():
            pass
        self.pool.shrink(0)

    def _give_up_oldest(self, besides: Kept | None = None) -> bool:
        """Free the sequence that was used longest ago; returns whether there is one."""
        oldest = self.kept.pop_oldest(besides)
        if oldest:
            self._engine.release(oldest.sequence)
        return oldest is not None

    @property
    def _reserved(self) -> int:
        """Tokens that the running requests may come to."""
        return sum(request.reserved for request in self.running)

    def _make_room(self, length: int, besides: Kept | None = None, source: Kept | None = None) -> bool:
        """Have what was left behind give way to so many tokens, the sequence `besides` last; returns whether it
        stays. source: stays before the pool does.
        """
        more = max(length - len(besides.tokens), 0) if besides else length
        places = self._plan.sequences - len(self.running) - (besides is None)
        while len(self.kept) > places or self._reserved + self.kept.tokens + more > self._plan.kv_token_budget:
            if not self._give_up_oldest(besides):
                break
        else:
            self._shrink_pool(more, besides or source)
            return besides is not None
        if besides:
            self.kept.take(besides)
            self._engine.release(besides.sequence)
        self._shrink_pool(length)
        return False

    def _shrink_pool(self, more: int, besides: Kept | None = None) -> None:
        """Have the pool give way to so many tokens, after the sequences that were left behind."""
        while self.pool.nbytes > self._pool_room(more) and self._give_up_oldest(besides):
            pass
        self.pool.shrink(self._pool_room(more))

    def _shares(self, job: Request) -> bool:
        return job.keep and not (self._engine.routes and self._engine.routes.matter)

    def _saves_states(self, job: Request) -> bool:
        return not self.kept.rewindable and self._shares(job)

    def _can_keep(self, prefix: Prefix | Pooled, job: Request) -> bool:
        """Whether what a request would copy need not give way to it."""
        if isinstance(prefix, Pooled) or prefix.kept is None:
            return True
        room = len(self.running) + 2 <= self._plan.sequences
        return room and self._reserved + len(prefix.kept.tokens) + job.reserved <= self._plan.kv_token_budget


def _loses_more(kept: Kept, shared: int, prefix: Prefix | Pooled) -> bool:
    """Whether going on with a kept sequence saves less than a copy would, or destroys a part of its prompt."""
    return shared < prefix.tokens or shared + BLOCK < kept.prompt
