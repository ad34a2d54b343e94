"""Admission: which sequence a job gets, and what of its tokens is there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

from hybrid.formats.block import BLOCK
from hybrid.serving.kept import Kept, KeptSequences, Tokens
from hybrid.serving.marks import marks_of, state_spacing
from hybrid.serving.pool import Pooled, PrefixPool
from hybrid.serving.prefixes import Prefix, longest_prefix, reader_of
from hybrid.serving.request import Job, Request

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine


HEADROOM = 64  # tokens that every running job may still grow by when another one is admitted


class Admission:
    """Gives the sequences of an engine to jobs, and the memory that they need as they grow. running: those that have
    a sequence, in order of admission. kept: the sequences that were left behind, which give way to whatever needs their
    place. pool: what they hold, too, and what those that gave way have held. fetching: those that wait, with their
    places kept, until the beginning of their tokens was read from files.
    """

    def __init__(self, engine: Engine) -> None:
        self.running: list[Job] = []
        self.fetching: list[Job] = []
        self.kept = KeptSequences(engine.plan.kv.repeatable)
        self.pool = PrefixPool(engine)
        self._spacing = state_spacing(engine.plan.kv)
        self._engine = engine
        self._plan = engine.plan

    @property
    def has_place(self) -> bool:
        """Whether there is a sequence for one more."""
        return len(self.running) + len(self.fetching) < self._plan.sequences

    def can_fit(self, job: Job, limit: int, without: Sequence[Job] = ()) -> bool:
        """Whether there is memory for the tokens so far of one more, and for all to grow a while, if what was left
        behind gives way. limit: tokens that it may come to. without: running jobs that had given up their sequences.
        """
        more = limit if self.routes_matter else min(job.length + HEADROOM, limit)
        staying = [other for other in self.running if other not in without]
        growing = sum(min(HEADROOM, max(0, other.limit - other.reserved)) for other in staying)
        growing += sum(other.length for other in self.fetching)
        return sum(other.reserved for other in staying) + growing + more <= self._plan.kv_token_budget

    def in_the_way(self, job: Job, limit: int, others: Sequence[Job]) -> Sequence[Job]:
        """Those of some running jobs, from the first on, that would have to give up their sequences for a waiting one
        to have a place and memory; nobody if it has them, or if all would not be enough.
        """
        places = len(self.running) + len(self.fetching) + 1 - self._plan.sequences
        counts = range(max(0, places), len(others) + 1)
        fitting = (count for count in counts if self.can_fit(job, limit, others[:count]))
        return others[: next(fitting, 0)]

    @property
    def routes_matter(self) -> bool:
        """Whether it matters which experts tokens take: then each is computed once."""
        return bool(self._engine.routes and self._engine.routes.matter)

    def collect(self) -> None:
        """Before every step: take what was read of files since."""
        self.fetching.clear()
        self.pool.collect(self._pool_room(0))

    def fetch(self, job: Job) -> bool:
        """Have files read that hold more of the beginning of its tokens, once for each time that it is given a
        sequence; returns whether it had better wait for them, or for those of another one.
        """
        if not self._shares(job):
            return False
        begin = not job.fetched and not self.pool.reading
        waits = self.pool.fetch(job.known, job.phase, self._pool_room(0), begin) and self.pool.reading
        job.fetched |= begin and waits
        if waits and job not in self.fetching:
            self.fetching.append(job)
        return waits

    def wait(self, seconds: float) -> None:
        """Until more of files was read, at most so long, if anybody waits for that."""
        if self.fetching:
            self.pool.wait(seconds)

    def look(self, job: Job) -> tuple[Prefix | Pooled | None, Job | None]:
        """The longest beginning of its tokens that can be copied, and who is reading a longer one: then it had better
        wait, and have that one read in its turn.
        """
        if not self._shares(job):
            return None, None
        pooled = self.pool.find(job.known, job.phase)
        prefix = longest_prefix(job, self.running, self.kept) if self.kept.rewindable else None
        longest = pooled if pooled and (prefix is None or pooled.tokens > prefix.tokens) else prefix
        known = longest.tokens if longest else 0
        return longest, reader_of(job, self.running, known, self.kept.rewindable)

    def settle(self, job: Job, prefix: Prefix | Pooled | None) -> None:
        """Give a job its sequence: one that was left behind with the beginning of its tokens, or a free one, which
        may get a copy of the prefix that `look` has found. It runs from now on.
        """
        job.reserved = job.limit if self.routes_matter else job.length
        found = self.kept.find(job.known, job.phase) if self._shares(job) else None
        if prefix and self._can_keep(prefix, job) and (not found or _loses_more(*found, prefix)):
            job.sequence, job.computed = self._copied(prefix, job.reserved), prefix.tokens
        elif found and self._make_room(job.reserved, found[0]):
            kept, job.computed = found
            self.kept.take(kept)
            job.sequence = kept.sequence
            job.reserved = max(job.reserved, kept.size)
        else:
            job.sequence = self._free(job.reserved)
        if isinstance(job, Request) and not job.reached:
            job.completion.cached_tokens = job.computed
        job.reached, job.saved = max(job.reached, job.computed), job.computed
        if self._saves_states(job):
            job.marks = marks_of(job.prompt, job.openings)
        self.running.append(job)

    def grow(self) -> bool:
        """Reserve the tokens that were chosen since; False: there is no memory for them, even if all that was left
        behind gives way.
        """
        more = sum(max(0, job.length - job.reserved) for job in self.running)
        while self.room < more:
            if not self._give_up_oldest():
                return False
        self.reserve()
        return True

    @property
    def room(self) -> int:
        """Tokens that memory can still be had for, if no sequence that was left behind gives way."""
        return self._plan.kv_token_budget - self._reserved - self.kept.tokens

    def reserve(self) -> None:
        """Count what the next step writes, guesses too, for which there is room."""
        for job in self.running:
            job.reserved = max(job.reserved, job.length + job.guessed)
        self._shrink_pool(0)

    def preempt(self, job: Job) -> None:
        """Take its sequence from a job that is to go on later. The pool keeps what it has room for; the rest of its
        tokens is computed anew then.
        """
        assert job.sequence is not None
        self.running.remove(job)
        if self._shares(job) and job.computed:
            self._save(job.sequence, job.known[: job.computed].copy(), job.phase, job.computed)
        self._engine.release(job.sequence)
        job.sequence, job.computed, job.reserved, job.fetched = None, 0, 0, False

    def leave(self, job: Job, keeps: bool) -> None:
        """Take the sequence from a job. keeps: whether its state may stay for a prompt that begins as its tokens do."""
        assert job.sequence is not None
        sequence, job.sequence = job.sequence, None
        self.running.remove(job)
        if keeps and isinstance(job, Request) and job.keep and job.computed:
            tokens = job.tokens[: job.computed].copy()
            held = 0 if self.routes_matter else job.reserved  # of all that it may come to, not of what it came to
            left = Kept(sequence, tokens, len(job.prompt), job.phase, held)
            self._save(sequence, tokens, job.phase, left.size)
            self.kept.put(left)
        else:
            self._engine.release(sequence)

    def forget(self) -> None:
        """Free what was left behind."""
        while self._give_up_oldest():
            pass
        self.pool.shrink(0)

    @property
    def holds_any(self) -> bool:
        """Whether anything was left behind."""
        return len(self.kept) + len(self.pool) > 0

    def shed(self, short: int) -> None:
        """Give back so many bytes of what was left behind: sequences first, which the pool has too."""
        token = self._plan.kv.token_bytes
        while short > 0 and (tokens := self.kept.tokens) and self._give_up_oldest():
            short -= (tokens - self.kept.tokens) * token
        if short > 0:
            self.pool.shrink(self.pool.nbytes - short)

    def _copied(self, prefix: Prefix | Pooled, length: int) -> int:
        """A free sequence with room for so many tokens, which begins with a prefix."""
        if isinstance(prefix, Pooled):
            self.pool.touch(prefix)
            sequence = self._free(length)
            self.pool.load(prefix, sequence)
            return sequence
        if prefix.kept:
            self.kept.use(prefix.kept)
        sequence = self._free(length, prefix.kept)
        self._engine.copy(prefix.sequence, sequence, prefix.tokens)
        return sequence

    def _free(self, length: int, source: Kept | None = None) -> int:
        """A sequence that nobody has, after what was left behind has given way to so many tokens. source: what is to be
        copied, for which there is room, too.
        """
        self._make_room(length, source=source)
        used = {job.sequence for job in self.running} | self.kept.sequences
        return next(sequence for sequence in range(self._plan.sequences) if sequence not in used)

    def save_marked(self, job: Job) -> None:
        """Keep the state of a running request, if it is one that later tokens change, where it has come to one of its
        marks, to a call of tools, or far from the last state of its prompt.
        """
        if not self._saves_states(job) or job.sequence is None:
            return
        far = job.computed < len(job.prompt) and job.computed - job.saved >= self._spacing
        if far or job.computed in job.marks or job.opens_call:
            self._save(job.sequence, job.tokens[: job.computed], job.phase, 0)
            job.saved = job.computed

    def _save(self, sequence: int, tokens: Tokens, phase: int, more: int) -> None:
        """Have the pool keep what a sequence holds after these tokens. Sequences that were left behind give way first:
        the pool has what they have. more: tokens that the sequence has beyond the reserved ones of running jobs.
        """
        wanted = min(self.pool.limit, self.pool.nbytes + self.pool.cost(tokens, phase))
        while self._pool_room(more) < wanted and self._give_up_oldest():
            pass
        self.pool.put(sequence, tokens, phase, self._pool_room(more))

    def _pool_room(self, more: int) -> int:
        """Bytes that the pool may have if the sequences come to hold so many tokens more."""
        tokens = self._reserved + self.kept.tokens + more
        return min(self.pool.limit, self._plan.state_bytes - tokens * self._plan.kv.token_bytes)

    def _give_up_oldest(self, besides: Kept | None = None) -> bool:
        """Free the sequence that was used longest ago; returns whether there is one."""
        oldest = self.kept.pop_oldest(besides)
        if oldest:
            self._engine.release(oldest.sequence)
        return oldest is not None

    @property
    def _reserved(self) -> int:
        """Tokens that the running jobs have memory for."""
        return sum(job.reserved for job in self.running)

    def _make_room(self, length: int, besides: Kept | None = None, source: Kept | None = None) -> bool:
        """Have what was left behind give way to so many tokens, the sequence `besides` last; returns whether it
        stays. source: stays before the pool does.
        """
        more = max(length - besides.size, 0) if besides else length
        places = self._plan.sequences - len(self.running) - (besides is None)
        while len(self.kept) > places or self.room < more:
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

    def _shares(self, job: Job) -> TypeGuard[Request]:
        return isinstance(job, Request) and job.keep and not self.routes_matter

    def _saves_states(self, job: Job) -> TypeGuard[Request]:
        return not self.kept.rewindable and self._shares(job)

    def _can_keep(self, prefix: Prefix | Pooled, job: Job) -> bool:
        """Whether what a request would copy need not give way to it."""
        if isinstance(prefix, Pooled) or prefix.kept is None:
            return True
        room = len(self.running) + 2 <= self._plan.sequences
        return room and prefix.kept.size + job.reserved <= self._plan.kv_token_budget - self._reserved


def _loses_more(kept: Kept, shared: int, prefix: Prefix | Pooled) -> bool:
    """Whether going on with a kept sequence saves less than a copy would, or destroys a part of its prompt."""
    return shared < prefix.tokens or shared + BLOCK < kept.prompt
