"""Continuous batching: which rows the next step computes, and what becomes of their logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hybrid.core import Batch, Completion, FinishReason, SamplingParams, StepResult, StepTimes, TextDelta, TokenLogprob
from hybrid.errors import HybridError, RequestError
from hybrid.serving.sampler import Sampler
from hybrid.text.detokenizer import TextStream

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class StepRecord:
    """One step: how many rows of prompts and of produced tokens it computed, and how long that took.

    times: as the executor measured them, with sampling. seconds: the whole step, from choosing its rows to
    the text of its tokens. cache: that of its `StepResult`.
    """

    prompt_rows: int
    decode_rows: int
    sampled: int
    times: StepTimes
    seconds: float
    cache: npt.NDArray[np.int64] | None = None


class Request:
    """One prompt on its way. The caller reads `completion`, takes from `deltas` and looks at `error`.

    prompt: int32 [n]. params: checked already. text: None when the model has no tokenizer; then only token ids are
    produced.
    """

    def __init__(
        self,
        prompt: Tokens,
        params: SamplingParams,
        eos_ids: frozenset[int] = frozenset(),
        text: TextStream | None = None,
        index: int = 0,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.completion = Completion(prompt.tolist(), logprobs=None if params.logprobs is None else [], index=index)
        self.deltas: deque[TextDelta] = deque()
        self.error: BaseException | None = None
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._text = text
        self._told = 0  # tokens that earlier deltas carried
        # The scheduler's own, set on admission.
        self.slot: int | None = None
        self.sampler: Sampler | None = None
        self.tokens = prompt  # the prompt and what was produced, with room for what may come
        self.length = len(prompt)
        self.computed = 0  # leading tokens whose keys and values are in the slot

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return self.length - self.computed

    def accept(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append a token; finish when it ends the text or the room is used up."""
        self.tokens[self.length] = token
        self.length += 1
        self.completion.token_ids.append(token)
        if logprob is not None and self.completion.logprobs is not None:
            self.completion.logprobs.append(logprob)
        if token in self._eos_ids:
            return self.finish("stop")
        piece = self._text.push(token) if self._text else ""
        if self._text and self._text.stopped:
            return self.finish("stop", piece)
        if self.length == len(self.tokens):
            return self.finish("length", piece)
        if piece or not self._text:
            self._tell(piece)

    def finish(self, reason: FinishReason, piece: str = "") -> None:
        """Give out the last text, whatever was held back included. A second call does nothing."""
        if self.finished:
            return
        if self._text:
            piece += self._text.finish()
            if self._text.stopped:
                reason = "stop"
        self._tell(piece, reason)
        self.completion.finish_reason = reason

    def _tell(self, piece: str, reason: FinishReason | None = None) -> None:
        completion = self.completion
        completion.text += piece
        fresh = tuple(completion.token_ids[self._told :])
        self._told = len(completion.token_ids)
        self.deltas.append(TextDelta(piece, fresh, reason, completion.index))


class Scheduler:
    """Runs requests on an engine, as many together as its slots and its memory for keys and values hold.

    Not thread-safe. on_step: called with the record of every step of requests.
    """

    def __init__(self, engine: Engine, on_step: Callable[[StepRecord], None] | None = None) -> None:
        self.on_step = on_step
        self._engine = engine
        self._plan = engine.plan
        self._limit = min(self._plan.max_seq_len, self._plan.kv_token_budget)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in order of admission; a slot is free when none of these has it

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def check(self, prompt: Tokens) -> None:
        """Raise RequestError when the prompt is empty, too long or holds what is not a token."""
        vocab = self._engine.spec.vocab
        if not len(prompt):
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) > self._limit:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and a sequence may have {self._limit} here: "
                "shorten it or raise --max-seq-len"
            )
        wrong = prompt[(prompt < 0) | (prompt >= vocab)]
        if len(wrong):
            raise RequestError(f"{wrong[0]} is not a token id of this model; allowed: 0 to {vocab - 1}")

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError, see `check`."""
        self.check(request.prompt)
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request at once; nothing happens to one that has finished."""
        if request.finished:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        self._leave(request)
        request.finish("cancelled")

    def cancel_all(self) -> None:
        for request in [*self._running, *self._waiting]:
            self.cancel(request)

    def step(self) -> list[Request]:
        """Compute one step; returns the requests that have new deltas or an error.

        Whatever the engine raises passes through, KeyboardInterrupt too: every running request then has it as
        its `error`, and its slot is free.
        """
        started = perf_counter()
        touched = self._admit()
        chunks = self._schedule()
        if not chunks:
            return touched
        try:
            result = self._engine.forward(_batch(chunks))
            sampling = perf_counter()
            sampled = self._sample(chunks, result.logits)
        except BaseException as error:
            for request in list(self._running):
                self._fail(request, error)
            raise
        ended = perf_counter()
        result = replace(result, times=_with_sampling(result.times, ended - sampling))
        self._report(chunks, len(sampled), result, ended - started)
        return touched + sampled

    def score(self, prompt: Tokens) -> npt.NDArray[np.float32]:
        """Next-token logits at every position of a prompt: float32 [len(prompt), vocab]. Raises RequestError.

        Requests go on until one slot is free for it.
        """
        if len(prompt):
            self.check(prompt)
        logits = np.empty((len(prompt), self._engine.spec.vocab), np.float32)
        while not self._fits(len(prompt)):
            self.step()
        slot = self._free_slot()
        try:
            for start in range(0, len(prompt), self._plan.max_rows):
                rows = prompt[start : start + self._plan.max_rows]
                every = np.arange(len(rows), dtype=np.int32)
                batch = Batch(rows, np.full_like(rows, slot), every + np.int32(start), every)
                logits[start : start + len(rows)] = self._engine.forward(batch).logits
        finally:
            self._engine.release(slot)
        return logits

    def check_integrity(self) -> None:
        """Raise AssertionError unless running requests have slots of their own and keep within the limits."""
        used = [request.slot for request in self._running]
        assert set(used) <= set(range(self._plan.sequences)) and len(set(used)) == len(used), used
        assert sum(len(request.tokens) for request in self._running) <= self._plan.kv_token_budget
        for request in self._running:
            assert not request.finished
            assert 0 <= request.computed <= request.length < len(request.tokens) <= self._plan.max_seq_len
        for request in self._waiting:
            assert request.slot is None and not request.finished

    def _admit(self) -> list[Request]:
        """Give slots to waiting requests in order of arrival; returns those without room for any token."""
        done = []
        while self._waiting:
            request = self._waiting[0]
            length = min(len(request.prompt) + request.params.max_tokens, self._limit)
            if not self._fits(length):
                break
            self._waiting.popleft()
            if length == len(request.prompt):
                request.finish("length")
                done.append(request)
            else:
                self._enter(request, length)
        return done

    def _fits(self, length: int) -> bool:
        reserved = sum(len(request.tokens) for request in self._running)
        return len(self._running) < self._plan.sequences and reserved + length <= self._plan.kv_token_budget

    def _free_slot(self) -> int:
        used = {request.slot for request in self._running}
        return next(slot for slot in range(self._plan.sequences) if slot not in used)

    def _enter(self, request: Request, length: int) -> None:
        request.tokens = np.empty(length, np.int32)
        request.tokens[: request.length] = request.prompt
        request.sampler = Sampler(request.params, request.prompt, self._engine.spec.vocab)
        request.slot = self._free_slot()
        self._running.append(request)

    def _leave(self, request: Request) -> None:
        if request in self._running:
            assert request.slot is not None
            self._running.remove(request)
            self._engine.release(request.slot)
            request.slot = None

    def _fail(self, request: Request, error: BaseException) -> None:
        request.error = error
        self._leave(request)
        request.finish("cancelled")

    def _schedule(self) -> list[tuple[Request, int]]:
        """Rows of the next step: one of every decoding request, then prompts in order of arrival."""
        chunks, room = [], self._plan.max_rows
        for request in sorted(self._running, key=lambda request: request.pending > 1):
            rows = min(request.pending, room)
            if rows == 0:
                break
            chunks.append((request, rows))
            room -= rows
        return chunks

    def _sample(self, chunks: Sequence[tuple[Request, int]], logits: npt.NDArray[np.float32]) -> list[Request]:
        """Advance the requests of a step; returns those that got a token, or an error of their own."""
        whole = [request for request, rows in chunks if rows == request.pending]
        for request, rows in chunks:
            request.computed += rows
        for request, row in zip(whole, logits, strict=True):
            assert request.sampler is not None
            try:
                request.accept(*request.sampler.choose(row))
            except HybridError as error:
                self._fail(request, error)
            if request.finished:
                self._leave(request)
        return whole

    def _report(self, chunks: Sequence[tuple[Request, int]], sampled: int, result: StepResult, seconds: float) -> None:
        if self.on_step is None:
            return
        rows = sum(rows for _, rows in chunks)
        prompt_rows = sum(_prompt_rows(request, rows) for request, rows in chunks)
        decode_rows = rows - prompt_rows
        self.on_step(StepRecord(prompt_rows, decode_rows, sampled, result.times, seconds, result.cache))


def _batch(chunks: Sequence[tuple[Request, int]]) -> Batch:
    starts = [request.computed for request, _ in chunks]
    ends = np.cumsum([rows for _, rows in chunks], dtype=np.int32)
    whole = [rows == request.pending for request, rows in chunks]
    return Batch(
        np.concatenate([r.tokens[r.computed : r.computed + rows] for r, rows in chunks]),
        np.repeat(_int32([r.slot for r, _ in chunks]), [rows for _, rows in chunks]),
        np.concatenate(
            [np.arange(at, at + rows, dtype=np.int32) for at, (_, rows) in zip(starts, chunks, strict=True)]
        ),
        ends[whole] - np.int32(1),
    )


def _int32(values: Any) -> Tokens:
    return np.asarray(values, dtype=np.int32)


def _prompt_rows(request: Request, rows: int) -> int:
    """How many of the last `rows` computed rows of a request belong to its prompt."""
    before = request.computed - rows
    return min(rows, max(0, len(request.prompt) - before))


def _with_sampling(times: StepTimes, sampling: float) -> StepTimes:
    return replace(times, sampling=sampling, total=times.total + sampling)
