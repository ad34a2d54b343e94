"""Continuous batching: which rows the next step computes, and what becomes of their logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import starmap
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hybrid.core import Batch, StepResult, StepTimes
from hybrid.errors import StepCancelled
from hybrid.serving.admission import Admission
from hybrid.serving.guesses import Tokens
from hybrid.serving.pool import Pooled, PoolReport
from hybrid.serving.prefixes import Prefix
from hybrid.serving.request import Job, Limits, Request, Score
from hybrid.serving.speculation import Speculation

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

Forward = Callable[[Sequence[Job], Batch], StepResult]


@dataclass(frozen=True)
class StepRecord:
    """One step: how many rows of prompts and of produced tokens it computed, and how long that took.

    sampled: tokens that were chosen. times: as the executor measured them, with sampling. seconds: the whole step, from
    choosing its rows to the text of its tokens. cache: that of its `StepResult`. prompts: of each token that was chosen
    the number of its prompt, in the list that was given to `generate`. guessed: rows of guesses; right: those of them
    that came true, which `decode_rows` has too.
    """

    prompt_rows: int
    decode_rows: int
    sampled: int
    times: StepTimes
    seconds: float
    cache: npt.NDArray[np.int64] | None = None
    prompts: tuple[int, ...] = ()
    guessed: int = 0
    right: int = 0


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
        self._admission = Admission(engine)
        self._running, self._kept = self._admission.running, self._admission.kept
        self._speculation = Speculation(engine)
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
        jobs, prompt_rows = [request for request, _ in chunks], sum(starmap(_prompt_rows, chunks))
        try:
            result = self._forward(jobs, _batch(chunks))
        except BaseException as error:
            return touched + self._fail(jobs, error)
        sampling, guessed = perf_counter(), sum(request.guessed for request in jobs)
        sampled = self._sample(chunks, result.logits)
        ended = perf_counter()
        times, rows = _with_sampling(result.times, ended - sampling), sum(rows for _, rows in chunks)
        if not prompt_rows:
            self._speculation.tell(rows, times.total)
        prompts = tuple(request.completion.index for request, right in sampled for _ in range(right + 1))
        right = sum(right for _, right in sampled)
        counts = (prompt_rows, rows - prompt_rows - guessed + right, len(prompts))
        self._report(StepRecord(*counts, times, ended - started, result.cache, prompts, guessed, right))
        return touched + [request for request, _ in sampled]

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
        while self._waiting and not self._scoring and (job := self._waiting[0]):
            length = self._length(job)
            if not self._admission.can_fit(length):
                break
            prefix = None
            if isinstance(job, Request):
                job.phase = self._engine.spec.length_phase(len(job.prompt))
                prefix, soon = self._admission.look(job)
                if soon:
                    break
            self._waiting.popleft()
            try:
                self._enter(job, length, prefix)
            except Exception as error:
                self._fail([job], error)
            if job.finished:
                done.append(job)
        return done

    def forget(self) -> None:
        """Free what was left behind."""
        self._admission.forget()

    @property
    def kept_lengths(self) -> list[int]:
        """Tokens of each kept sequence, least recently used first."""
        return self._kept.lengths

    @property
    def prefix_report(self) -> PoolReport:
        """What is kept beyond the sequences."""
        return self._admission.pool.report()

    @property
    def running_tokens(self) -> int:
        """Tokens of the running requests whose keys and values are computed."""
        return sum(request.computed for request in self._running)

    def _length(self, job: Job) -> int:
        """Tokens to reserve."""
        more = job.params.max_tokens or 0 if isinstance(job, Request) else 0
        return min(len(job.prompt) + more, self._limits.tokens)

    def _enter(self, job: Job, length: int, prefix: Prefix | Pooled | None) -> None:
        if isinstance(job, Score):
            job.sequence, self._scoring = self._admission.free(length), job
        elif isinstance(job, Request):
            if length == len(job.prompt):
                return job.finish("length")
            job.enter(self._engine.spec.vocab, length)
            self._admission.settle(job, prefix)

    def _leave(self, job: Job) -> None:
        """Take a job from wherever it is, and free its sequence."""
        if job.sequence is None:
            with suppress(ValueError):
                self._waiting.remove(job)
            return
        if job is self._scoring:
            self._scoring = None
        self._admission.leave(job, self._is_whole(job))

    def _is_whole(self, job: Job) -> bool:
        """Whether the state of its sequence is known. That of a step which was cut is whole up to the rows of that
        step, if a state can be rewound.
        """
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
        self._speculation.guess(self._running)
        chunks, room = [], self._plan.max_rows
        for request in sorted(self._running, key=lambda request: request.pending > 1):
            rows = min(request.pending + request.guessed, room)
            if request.marks:  # of requests that have no guesses
                rows = min(rows, request.until_mark)
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

    def _sample(
        self, chunks: Sequence[tuple[Request, int]], logits: npt.NDArray[np.float32]
    ) -> list[tuple[Request, int]]:
        """Advance the requests of a step; returns those that got a token, or an error of their own, with the number of
        guesses that came true.
        """
        sampled, first = [], 0
        for request, rows in chunks:
            whole, rows = _is_whole(request, rows), rows - request.guessed
            request.computed += rows
            self._admission.save_marked(request)
            if whole:
                last = first + 1 + request.guessed
                sampled.append((request, self._choose(request, logits[first:last])))
                first = last
        return sampled

    def _choose(self, request: Request, logits: npt.NDArray[np.float32]) -> int:
        """How many guesses came true."""
        right = 0
        try:
            right = request.choose(logits)
        except BaseException as error:  # of a processor of logits too
            request.fail(error)
        if request.finished:
            self._leave(request)
        elif request.opens_call:
            self._admission.save(request)
        return right

    def _report(self, record: StepRecord) -> None:
        if self.on_step is None:
            return
        try:
            self.on_step(record)
        except BaseException as error:
            self.on_step, self.observer_error = None, error


def _batch(chunks: Sequence[tuple[Request, int]]) -> Batch:
    starts = [request.computed for request, _ in chunks]
    ends = np.cumsum([rows for _, rows in chunks], dtype=np.int32)
    wanted = [
        np.arange(end - 1 - request.guessed, end, dtype=np.int32)
        for end, (request, rows) in zip(ends, chunks, strict=True)
        if _is_whole(request, rows)
    ]
    return Batch(
        np.concatenate([r.tokens[r.computed : r.computed + rows] for r, rows in chunks]),
        np.repeat(_int32([r.sequence for r, _ in chunks]), [rows for _, rows in chunks]),
        np.concatenate(
            [np.arange(at, at + rows, dtype=np.int32) for at, (_, rows) in zip(starts, chunks, strict=True)]
        ),
        np.concatenate([_int32([]), *wanted]),
        np.repeat(_int32([r.length for r, _ in chunks]), [rows for _, rows in chunks]),
    )


def _int32(values: Any) -> Tokens:
    return np.asarray(values, dtype=np.int32)


def _is_whole(request: Request, rows: int) -> bool:
    """Whether a token can be chosen after so many rows."""
    return rows == request.pending + request.guessed


def _prompt_rows(request: Request, rows: int) -> int:
    """How many of the next `rows` rows of a request belong to its prompt."""
    return min(rows, max(0, len(request.prompt) - request.computed))


def _with_sampling(times: StepTimes, sampling: float) -> StepTimes:
    return replace(times, sampling=sampling, total=times.total + sampling)
