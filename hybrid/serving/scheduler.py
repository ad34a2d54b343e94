"""Continuous batching: which rows the next step computes, and what becomes of their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hybrid.core import Batch, StepResult, StepTimes
from hybrid.errors import StepCancelled
from hybrid.serving.admission import Admission
from hybrid.serving.fairness import Fairness
from hybrid.serving.pace import Pace, pairs_of
from hybrid.serving.pool import Pooled, PoolReport
from hybrid.serving.prefixes import Prefix
from hybrid.serving.relief import Relief
from hybrid.serving.request import Job, Limits, Request
from hybrid.serving.rows import Chunk, is_decoding, make_batch
from hybrid.serving.speculation import Speculation

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

FILE_SECONDS = 0.005  # that a step waits for files at most: somebody may ask for something meanwhile
Forward = Callable[[Sequence[Job], Batch], StepResult]


@dataclass(frozen=True)
class StepRecord:
    """One step: how many rows of prompts and of produced tokens it computed, and how long that took.

    sampled: tokens that were chosen. times: as the executor measured them, with sampling. seconds: the whole step, from
    choosing its rows to the text of its tokens. cache: that of its `StepResult`. prompts: of each token that was chosen
    the number of its prompt, in the list that was given to `generate`. guessed: rows of guesses; right: those of them
    that came true, which `decode_rows` has too. preempted: how many jobs gave up their sequences for it.
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
    preempted: int = 0


class Scheduler:
    """Runs jobs on an engine, as many together as its sequences and its memory for keys and values hold.

    Every step has the next token of every text that is produced, and as many tokens of prompts as there is room for,
    or as let texts keep their pace (`hybrid.serving.pace`).
    Prompts are read, and sequences given, in turns: by priority, then to the client that has got least so far
    (`hybrid.serving.fairness`), then in order of arrival. Memory is reserved as texts grow. Where there is no more, the
    job whose turn comes last, by priority and arrival, gives up its sequence. It waits with its tokens, which are
    computed anew when there is room: the same bits, so its text goes on as if nothing had been. The first is never
    the one that gives up, so that there is always one that comes to its end. A job that waits for a place has those of
    higher priority numbers give up theirs, too.

    A request whose prompt begins with what files hold waits until they are read, and others go on meanwhile.
    A request that says so leaves its sequence behind, and one that says so goes on with it where its prompt begins
    with the same tokens (`hybrid.serving.kept`), or copies the beginning of one that is left behind or runs
    (`hybrid.serving.prefixes`): the same bits as if it were computed anew. What is left behind gives way to whatever
    needs its place.

    One thread calls it: that of a `Loop`. forward: runs a step of these jobs; `Engine.forward` if it is not given.
    on_step: called with the record of every step. One that raises is called no more; what it raised is
    `observer_error`.
    """

    def __init__(self, engine: Engine, forward: Forward | None = None) -> None:
        self.on_step: Callable[[StepRecord], None] | None = None
        self.observer_error: BaseException | None = None
        self._engine = engine
        self._forward = forward or (lambda jobs, batch: engine.forward(batch))
        self._plan = engine.plan
        self._limits = Limits.of(engine)
        self._admission = Admission(engine)
        self._running, self._kept = self._admission.running, self._admission.kept
        self._waiting: list[Job] = []
        self._fairness = Fairness()
        self._speculation = Speculation(engine)
        self._relief = Relief(engine.plan, self._admission)
        self._pace = Pace(engine.step_bytes, engine.plan.max_itl)
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, *jobs: Job) -> None:
        """Queue jobs, all or none. Raises RequestError, see `Limits.check`."""
        for job in jobs:
            self._limits.check(job.prompt)
        for job in jobs:
            self._arrivals += 1
            job.arrival = self._arrivals
            self._fairness.enter(job.client)
            self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """End a job at once; nothing happens to one that has finished."""
        if not job.finished:
            self._leave(job)
            job.cancel()

    def fail_all(self, error: BaseException) -> list[Job]:
        """End every job by an error; returns them."""
        self.forget()
        return self._fail([*self._running, *self._waiting], error)

    def close(self) -> None:
        """Have written what is to outlive this process."""
        self._admission.pool.close()

    def abandon(self) -> None:
        """Leave the files of kept prompts to another engine. Any thread may call it, whatever the one does that calls
        everything else.
        """
        self._admission.pool.abandon()

    @property
    def holds_any(self) -> bool:
        """Whether `rest` should be called while there is no work."""
        return self._admission.holds_any

    def rest(self) -> None:
        """Without work, every `CHECK_SECONDS`: give memory back that others need, or that was idle for long."""
        self._relief.check(busy=False)

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
        """Tokens of the running jobs whose keys and values are computed."""
        return sum(job.computed for job in self._running)

    def step(self) -> list[Job]:
        """Compute one step; returns the jobs that have something to deliver.

        Whatever the engine raises is the error of the jobs whose rows it computed, and their sequences are free; the
        others go on.
        """
        started = perf_counter()
        self._relief.check(busy=True)
        self._admission.collect()
        preempted = self._reserve() + self._push_out()
        chunks, touched = self._schedule()
        if not chunks:
            if not touched:
                self._admission.wait(FILE_SECONDS)
            return touched
        jobs = [job for job, _ in chunks]
        try:
            result = self._forward(jobs, make_batch(chunks))
        except BaseException as error:
            return touched + self._fail(jobs, error)
        sampling, rows = perf_counter(), sum(rows for _, rows in chunks)
        pairs = sum(pairs_of(rows, job.computed) for job, rows in chunks)
        prompt_rows = sum(rows - job.guessed for job, rows in chunks if not is_decoding(job))
        guessed = sum(job.guessed for job in jobs)
        told = self._advance(chunks, result.logits)
        ended = perf_counter()
        times = _with_sampling(result.times, ended - sampling)
        self._pace.tell(rows, times.total, pairs)
        if not prompt_rows:
            self._speculation.tell(rows, times.total)
        prompts = tuple(job.completion.index for job, count in told if isinstance(job, Request) for _ in range(count))
        right = sum(max(0, count - 1) for _, count in told)
        counts = (prompt_rows, rows - prompt_rows - guessed + right, len(prompts))
        seconds = ended - started
        self._report(StepRecord(*counts, times, seconds, result.cache, prompts, guessed, right, preempted))
        return touched + [job for job, _ in told]

    def _turn(self, job: Job) -> tuple[int, int, int]:
        """That of the job which comes first is the smallest."""
        return job.priority, self._fairness.got(job.client), job.arrival

    def _reserve(self) -> int:
        """Have memory for the tokens that were chosen last; returns how many jobs gave up their sequences for it."""
        preempted = 0
        while not self._admission.grow():
            last = max(self._running, key=lambda job: (job.priority, job.arrival))
            self._preempt(last)
            preempted += 1
        return preempted

    def _push_out(self) -> int:
        """Where the waiting job whose turn is next finds no place or no memory, have those of higher priority numbers
        give up theirs, the last first, if that is enough; returns how many did. It has to be able to begin then: those
        who gave way would come back otherwise, and had given way for nothing.
        """
        job = min(self._waiting, key=self._turn, default=None)
        less = [other for other in self._running if job and other.priority > job.priority]
        if job is None or not less or self._admission.routes_matter:
            return 0
        less.sort(key=lambda other: (other.priority, other.arrival), reverse=True)
        job.phase = self._engine.spec.length_phase(job.length)
        leaving = self._admission.in_the_way(job, self._limit(job), less)
        if not leaving or self._admission.fetch(job) or self._admission.look(job)[1]:
            return 0
        if any(other.pending > 1 and self._turn(other) < self._turn(job) for other in self._running):
            return 0  # a prompt that is read first takes the rows
        for other in leaving:
            self._preempt(other)
        return len(leaving)

    def _preempt(self, job: Job) -> None:
        self._admission.preempt(job)
        self._waiting.append(job)

    def _schedule(self) -> tuple[list[Chunk], list[Job]]:
        """The rows of the next step: one of every text that is produced, then prompts in their turns, of which the
        last may have to be read on in a later step. Returns the jobs that ended without a row too.
        """
        for job in self._running:
            self._begin_phase(job)
        decoding = [job for job in self._running if job.pending == 1]
        if len(decoding) > self._plan.max_rows:
            decoding = sorted(decoding, key=self._turn)[: self._plan.max_rows]
        room = self._plan.max_rows - len(decoding)
        chunks, ended = list[Chunk](), list[Job]()
        reading, waiting = [job for job in self._running if job.pending > 1], [*self._waiting]
        if reading or (waiting and self._admission.has_place):
            pairs = sum(pairs_of(1, job.computed) for job in decoding)
            room = self._pace.prompt_rows(len(decoding), whole := room, pairs)
            while room > 0 and (reader := self._next(reading, waiting, ended)):
                given = sum(rows for _, rows in chunks)
                room = min(room, self._pace.prompt_rows(len(decoding), whole, pairs, reader.computed) - given)
                if room > 0:
                    chunks.append((reader, min(reader.until_mark, room)))
                    room -= chunks[-1][1]
        if not chunks:  # guesses would delay a prompt
            self._speculation.guess(decoding, min(room, self._admission.room))
            self._admission.reserve()
        return [(job, 1 + job.guessed) for job in decoding] + chunks, ended

    def _next(self, reading: list[Job], waiting: list[Job], ended: list[Job]) -> Job | None:
        """Whose prompt is read next, which is taken from its list; None if there is none, or room for none.

        The turn of a job that had better wait for a prompt being read, which begins as its own does, is that one's.
        """
        while True:
            if not self._admission.has_place:
                waiting.clear()
            job: Job | None = min([*reading, *waiting], key=self._turn, default=None)
            if job is None or job in reading:
                break
            job.phase = self._engine.spec.length_phase(job.length)
            if not self._admission.can_fit(job, self._limit(job)):
                waiting.clear()  # or those behind it would take the room again and again
                continue
            waiting.remove(job)
            if self._admission.fetch(job):
                continue
            prefix, reader = self._admission.look(job)
            if reader is None and self._enter(job, prefix, ended):
                return job
            if reader in reading:
                job = reader
                break
        if job:
            reading.remove(job)
        return job

    def _enter(self, job: Job, prefix: Prefix | Pooled | None, ended: list[Job]) -> bool:
        """Give a job its sequence; False: it has ended."""
        try:
            job.enter(self._engine.spec.vocab, self._limit(job))
            if not job.finished:
                self._admission.settle(job, prefix)
        except Exception as error:
            job.fail(error)
        if job.finished:
            self._leave(job)
            ended.append(job)
            return False
        self._waiting.remove(job)
        return True

    def _limit(self, job: Job) -> int:
        """Tokens that it may come to."""
        more = job.params.max_tokens or 0 if isinstance(job, Request) else 0
        return min(len(job.prompt) + more, self._limits.tokens)

    def _begin_phase(self, job: Job) -> None:
        """Where a longer sequence has other keys, all its tokens are computed once more when it has become longer."""
        phase = self._engine.spec.length_phase(job.length)
        if phase != job.phase:
            assert job.sequence is not None
            self._engine.release(job.sequence)
            job.computed, job.phase = 0, phase

    def _advance(self, chunks: Sequence[Chunk], logits: npt.NDArray[np.float32]) -> list[tuple[Job, int]]:
        """Give jobs the logits of a step; returns those that have something to deliver, a token, a result or an error
        of their own, with the number of tokens that they got.
        """
        told, first = list[tuple[Job, int]](), 0
        for job, rows in chunks:
            wanted, length, known = job.wanted(rows), job.length, rows - job.guessed
            try:
                if wanted:
                    job.take(logits[first : first + wanted])
            except BaseException as error:  # of a processor of logits too
                job.fail(error)
            first += wanted
            self._fairness.charge(job.client, job.advance(known), job.length - length)
            if job.finished:
                self._leave(job)
            else:
                self._admission.save_marked(job)
            if job.finished or job.length > length:
                told.append((job, job.length - length))
        return told

    def _leave(self, job: Job) -> None:
        """Take a job that ends from wherever it is, and free its sequence."""
        if job.sequence is not None:
            self._admission.leave(job, self._is_whole(job))
        elif job in self._waiting:
            self._waiting.remove(job)
        else:
            return  # it was refused
        self._fairness.leave(job.client)

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

    def _report(self, record: StepRecord) -> None:
        try:
            if self.on_step is not None:
                self.on_step(record)
        except BaseException as error:
            self.on_step, self.observer_error = None, error


def _with_sampling(times: StepTimes, sampling: float) -> StepTimes:
    return replace(times, sampling=sampling, total=times.total + sampling)
