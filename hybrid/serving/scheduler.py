"""Continuous batching: which rows the next step computes, and what becomes of their logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt

from hybrid.core import Batch, StepResult, StepTimes
from hybrid.errors import StepCancelled
from hybrid.formats.block import BLOCK
from hybrid.serving.kept import Kept, KeptSequences
from hybrid.serving.prefixes import Prefix, is_being_read, longest_prefix
from hybrid.serving.request import Job, Limits, Request, Score, Tokens

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

Forward = Callable[[Sequence[Job], Batch], StepResult]


@dataclass(frozen=True)
class StepRecord:
    """One step: how many rows of prompts and of produced tokens it computed, and how long that took.

    times: as the executor measured them, with sampling. seconds: the whole step, from choosing its rows to
    the text of its tokens. cache: that of its `StepResult`. prompts: of each token that was chosen the number of its
    prompt, in the list that was given to `generate`.
    """

    prompt_rows: int
    decode_rows: int
    sampled: int
    times: StepTimes
    seconds: float
    cache: npt.NDArray[np.int64] | None = None
    prompts: tuple[int, ...] = ()


class Scheduler:
    """Runs requests on an engine, as many together as its sequences and its memory for keys and values hold.

    A request that says so leaves its sequence behind, and one that says so goes on with it where its prompt begins
    with the same tokens (`hybrid.serving.kept`), or copies the beginning of one that is left behind or runs
    (`hybrid.serving.prefixes`): the same bits as if it were computed anew. What is left behind gives way to whatever
    needs its place.

    One thread calls it: that of a `Loop`. forward: runs a step of these jobs; `Engine.forward` if it is not given.
    on_step: called with the record of every step of requests. One that raises is called no more; what it raised is
    `observer_error`.
    """

    def __init__(self, engine: Engine, forward: Forward | None = None) -> None:
        self.on_step: Callable[[StepRecord], None] | None = None
        self.observer_error: BaseException | None = None
        self._engine = engine
        self._forward = forward or (lambda jobs, batch: engine.forward(batch))
        self._plan = engine.plan
        self._limits = Limits.of(engine)
        self._waiting: deque[Job] = deque()
        self._running: list[Request] = []  # in order of admission; a sequence is free when none of these has it
        self._kept = KeptSequences(engine.plan.kv.repeatable)
        self._scoring: Score | None = None  # has the steps to itself, and nothing is admitted meanwhile

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting or self._scoring)

    def add(self, job: Job) -> None:
        """Queue a request or a score. Raises RequestError, see `Limits.check`."""
        self._limits.check(job.prompt)
        self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """End a job at once; nothing happens to one that has finished."""
        if not job.finished:
            self._leave(job)
            job.cancel()

    def fail_all(self, error: BaseException) -> list[Job]:
        """End every job by an error; returns them."""
        scoring = [self._scoring] if self._scoring else []
        self.forget()
        return self._fail([*self._running, *scoring, *self._waiting], error)

    def step(self) -> list[Job]:
        """Compute one step; returns the jobs that have something to deliver.

        Whatever the engine raises is the error of the jobs whose rows it computed, and their sequences are free; the
        others go on.
        """
        started = perf_counter()
        touched = self._admit()
        if self._scoring:
            return touched + self._score(self._scoring)
        chunks = self._schedule()
        if not chunks:
            return touched
        jobs = [request for request, _ in chunks]
        try:
            result = self._forward(jobs, _batch(chunks))
        except BaseException as error:
            return touched + self._fail(jobs, error)
        sampling = perf_counter()
        sampled = self._sample(chunks, result.logits)
        ended = perf_counter()
        result = replace(result, times=_with_sampling(result.times, ended - sampling))
        self._report(chunks, sampled, result, ended - started)
        return touched + sampled

    def _score(self, score: Score) -> list[Job]:
        """The next rows of a score, a step of their own; returns it once it has finished."""
        start = score.computed
        rows = score.prompt[start : start + self._plan.max_rows]
        every = np.arange(len(rows), dtype=np.int32)
        lengths = np.full_like(rows, len(score.prompt))
        batch = Batch(rows, np.full_like(rows, score.sequence), every + np.int32(start), every, lengths)
        try:
            score.take(self._forward([score], batch).logits)
        except BaseException as error:
            return self._fail([score], error)
        score.computed += len(rows)
        if not score.finished:
            return []
        self._leave(score)
        return [score]

    def _admit(self) -> list[Job]:
        """Give sequences to what waits, in order of arrival; returns what has no room for a token and ended."""
        done: list[Job] = []
        while self._waiting and not self._scoring:
            job = self._waiting[0]
            length = self._length(job)
            if not self._can_fit(length) or self._is_read_by_another(job):
                break
            self._waiting.popleft()
            try:
                self._enter(job, length)
            except Exception as error:
                self._fail([job], error)
            if job.finished:
                done.append(job)
        return done

    def forget(self) -> None:
        """Free the sequences that were left behind."""
        while kept := self._kept.pop_oldest():
            self._engine.release(kept.sequence)

    @property
    def kept_lengths(self) -> list[int]:
        """Tokens of each kept sequence, least recently used first."""
        return self._kept.lengths

    def _length(self, job: Job) -> int:
        """Tokens to reserve."""
        more = job.params.max_tokens or 0 if isinstance(job, Request) else 0
        return min(len(job.prompt) + more, self._limits.tokens)

    def _can_fit(self, length: int) -> bool:
        """Whether there is room for so many tokens, if what was left behind gives way."""
        return len(self._running) < self._plan.sequences and self._reserved + length <= self._plan.kv_token_budget

    @property
    def _reserved(self) -> int:
        """Tokens that the running requests may come to."""
        return sum(request.reserved for request in self._running)

    def _make_room(self, length: int, besides: Kept | None = None) -> bool:
        """Have what was left behind give way to so many tokens, the sequence `besides` last; returns whether it
        stays.
        """
        more = max(length - len(besides.tokens), 0) if besides else length
        places = self._plan.sequences - len(self._running) - (besides is None)
        while len(self._kept) > places or self._reserved + self._kept.tokens + more > self._plan.kv_token_budget:
            oldest = self._kept.pop_oldest(besides)
            if oldest is None:
                break
            self._engine.release(oldest.sequence)
        else:
            return besides is not None
        if besides:
            self._kept.take(besides)
            self._engine.release(besides.sequence)
        return False

    def _free_sequence(self) -> int:
        used = {request.sequence for request in self._running} | self._kept.sequences
        return next(sequence for sequence in range(self._plan.sequences) if sequence not in used)

    def _enter(self, job: Job, length: int) -> None:
        if isinstance(job, Score):
            self._make_room(length)
            job.sequence, self._scoring = self._free_sequence(), job
        elif isinstance(job, Request):
            if length == len(job.prompt):
                return job.finish("length")
            job.enter(self._engine.spec.vocab, length)
            self._settle(job)
            self._running.append(job)

    def _settle(self, job: Request) -> None:
        """Give a request its sequence: one that was left behind with the beginning of its prompt, or a free one."""
        job.reserved = len(job.tokens)
        found = self._kept.find(job.prompt, job.phase) if self._shares(job) else None
        prefix = self._copyable(job)
        if prefix and (not found or _loses_more(*found, prefix)):
            if prefix.kept:
                self._kept.use(prefix.kept)
            self._make_room(job.reserved)
            sequence = self._free_sequence()
            self._engine.copy(prefix.sequence, sequence, prefix.tokens)
            job.sequence, job.computed = sequence, prefix.tokens
            job.completion.cached_tokens = job.computed
        elif found and self._make_room(job.reserved, found[0]):
            kept, job.computed = found
            self._kept.take(kept)
            job.sequence = kept.sequence
            job.reserved = max(job.reserved, len(kept.tokens))
            job.completion.cached_tokens = job.computed
        else:
            self._make_room(job.reserved)
            job.sequence = self._free_sequence()

    def _shares(self, job: Job) -> TypeGuard[Request]:
        return isinstance(job, Request) and job.keep and not self._routes_matter

    def _is_read_by_another(self, job: Job) -> bool:
        """Whether a request had better wait, because a prompt that begins as its own does is being read. Prompts are
        read in order of arrival, so that this delays nothing behind it either.
        """
        if isinstance(job, Request):
            job.phase = self._engine.spec.length_phase(len(job.prompt))
        if not self._shares(job) or not self._kept.rewindable:
            return False
        prefix = longest_prefix(job, self._running, self._kept)
        return is_being_read(job, self._running, prefix.tokens if prefix else 0)

    def _copyable(self, job: Request) -> Prefix | None:
        """What a request may copy; what was left behind must not give way to it."""
        if not self._shares(job) or not self._kept.rewindable:
            return None
        prefix = longest_prefix(job, self._running, self._kept)
        if prefix is None or prefix.kept is None:
            return prefix
        room = len(self._running) + 2 <= self._plan.sequences
        tokens = self._reserved + len(prefix.kept.tokens) + job.reserved
        return prefix if room and tokens <= self._plan.kv_token_budget else None

    @property
    def _routes_matter(self) -> bool:
        """Whether the experts of every token are recorded, or told by a trace: then every token is computed."""
        routes = self._engine.routes
        return routes is not None and (routes.observer is not None or routes.trace is not None)

    def _leave(self, job: Job) -> None:
        """Take a job from wherever it is, and free its sequence."""
        if job.sequence is None:
            with suppress(ValueError):
                self._waiting.remove(job)
            return
        if job is self._scoring:
            self._scoring = None
        elif isinstance(job, Request):
            self._running.remove(job)
        sequence, job.sequence = job.sequence, None
        if isinstance(job, Request) and self._leaves_behind(job):
            self._kept.put(Kept(sequence, job.tokens[: job.computed].copy(), len(job.prompt), job.phase))
        else:
            self._engine.release(sequence)

    def _leaves_behind(self, job: Request) -> bool:
        """Whether the state of its sequence is kept. That of a step which was cut is whole up to the rows of that
        step, if a state can be rewound.
        """
        if not job.keep or not job.computed:
            return False
        return job.error is None or (isinstance(job.error, StepCancelled) and self._kept.rewindable)

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> list[Job]:
        """End jobs by an error; returns them."""
        for job in jobs:
            job.fail(error)
            self._leave(job)
        return list(jobs)

    def _schedule(self) -> list[tuple[Request, int]]:
        """Rows of the next step: one of every decoding request, then prompts in order of arrival."""
        for request in self._running:
            self._begin_phase(request)
        chunks, room = [], self._plan.max_rows
        for request in sorted(self._running, key=lambda request: request.pending > 1):
            rows = min(request.pending, room)
            if rows == 0:
                break
            chunks.append((request, rows))
            room -= rows
        return chunks

    def _begin_phase(self, request: Request) -> None:
        """Where a longer sequence has other keys, all its tokens are computed once more when it has become longer."""
        phase = self._engine.spec.length_phase(request.length)
        if phase != request.phase:
            assert request.sequence is not None
            self._engine.release(request.sequence)
            request.computed, request.phase = 0, phase

    def _sample(self, chunks: Sequence[tuple[Request, int]], logits: npt.NDArray[np.float32]) -> list[Job]:
        """Advance the requests of a step; returns those that got a token, or an error of their own."""
        whole = [request for request, rows in chunks if rows == request.pending]
        for request, rows in chunks:
            request.computed += rows
        for request, row in zip(whole, logits, strict=True):
            try:
                request.choose(row)
            except BaseException as error:  # of a processor of logits too
                request.fail(error)
            if request.finished:
                self._leave(request)
        return [*whole]

    def _report(
        self, chunks: Sequence[tuple[Request, int]], sampled: Sequence[Job], result: StepResult, seconds: float
    ) -> None:
        if self.on_step is None:
            return
        rows = sum(rows for _, rows in chunks)
        prompt_rows = sum(_prompt_rows(request, rows) for request, rows in chunks)
        decode_rows = rows - prompt_rows
        try:
            prompts = tuple(job.completion.index for job in sampled if isinstance(job, Request))
            counts = (prompt_rows, decode_rows, len(sampled))
            self.on_step(StepRecord(*counts, result.times, seconds, result.cache, prompts))
        except BaseException as error:
            self.on_step, self.observer_error = None, error


def _loses_more(kept: Kept, shared: int, prefix: Prefix) -> bool:
    """Whether going on with a kept sequence saves less than a copy would, or destroys a part of its prompt."""
    return shared < prefix.tokens or shared + BLOCK < kept.prompt


def _batch(chunks: Sequence[tuple[Request, int]]) -> Batch:
    starts = [request.computed for request, _ in chunks]
    ends = np.cumsum([rows for _, rows in chunks], dtype=np.int32)
    whole = [rows == request.pending for request, rows in chunks]
    return Batch(
        np.concatenate([r.tokens[r.computed : r.computed + rows] for r, rows in chunks]),
        np.repeat(_int32([r.sequence for r, _ in chunks]), [rows for _, rows in chunks]),
        np.concatenate(
            [np.arange(at, at + rows, dtype=np.int32) for at, (_, rows) in zip(starts, chunks, strict=True)]
        ),
        ends[whole] - np.int32(1),
        np.repeat(_int32([r.length for r, _ in chunks]), [rows for _, rows in chunks]),
    )


def _int32(values: Any) -> Tokens:
    return np.asarray(values, dtype=np.int32)


def _prompt_rows(request: Request, rows: int) -> int:
    """How many of the last `rows` computed rows of a request belong to its prompt."""
    before = request.computed - rows
    return min(rows, max(0, len(request.prompt) - before))


def _with_sampling(times: StepTimes, sampling: float) -> StepTimes:
    return replace(times, sampling=sampling, total=times.total + sampling)
