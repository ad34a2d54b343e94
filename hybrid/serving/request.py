"""What callers ask for, on its way: a prompt to complete, or one to score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hybrid.core import Completion, FinishReason, SamplingParams, TextDelta, TokenLogprob
from hybrid.errors import CapacityError, RequestError
from hybrid.serving.guesses import Guesses, PromptLookup, Tokens
from hybrid.serving.sampler import Sampler, token_logprob
from hybrid.text.answer import AnswerStream
from hybrid.text.grammar import TokenMask
from hybrid.text.openings import Openings
from hybrid.text.parts import Parts

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

_NOTHING, _NO_CHAT = Parts(), Openings()


@dataclass(frozen=True)
class Limits:
    """What a prompt must keep to. tokens: that a sequence may have, what is produced included. advice: what to do about
    one that has more.
    """

    vocab: int
    tokens: int
    advice: str

    @classmethod
    def of(cls, engine: Engine) -> Limits:
        spec, tokens = engine.spec, min(engine.plan.max_seq_len, engine.plan.kv_token_budget)
        more = "shorten it or raise max_seq_len (--max-seq-len)"
        most = f"shorten it to the model's {spec.max_position} positions"
        return cls(spec.vocab, tokens, more if tokens < spec.max_position else most)

    def check(self, prompt: Tokens) -> None:
        """Raise RequestError when the prompt is empty, too long or holds what is not a token."""
        if not len(prompt):
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) > self.tokens:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and a sequence may have {self.tokens} here: {self.advice}"
            )
        self.check_ids(prompt)

    def check_ids(self, prompt: Tokens) -> None:
        """Raise RequestError when there is what is not a token."""
        wrong = prompt[(prompt < 0) | (prompt >= self.vocab)]
        if len(wrong):
            raise RequestError(f"{wrong[0]} is not a token id of this model; allowed: 0 to {self.vocab - 1}")


class Job(ABC):
    """What is computed in one sequence for one caller.

    sink: given the results by the engine's thread, an error too; it never waits. unwanted: the caller has left; any
    thread may set it. priority: jobs of a lower number come first. client: those of one client share what it gets.
    """

    def __init__(self, prompt: Tokens, priority: int = 0) -> None:
        self.prompt = prompt
        self.sink: Callable[[Any], None] = _nowhere
        self.unwanted = False
        self.error: BaseException | None = None
        self.priority, self.client = priority, ""
        # The scheduler's own.
        self.arrival = 0  # its number in the order of arrival
        self.tokens = prompt  # the prompt and what was produced, with room for what may come
        self.length = len(prompt)
        self.guessed = 0  # tokens behind these that the next step computes as guesses
        self.sequence: int | None = None
        self.reserved = 0  # tokens that its sequence may hold
        self.computed = 0  # leading tokens whose keys and values are in the sequence
        self.reached = 0  # leading tokens that were computed once, if in a sequence that it had to give up
        self.phase = 0  # of the length for which its tokens are computed, see `ModelSpec.length_phase`
        self.marks: tuple[int, ...] = ()  # numbers of tokens after which a recurrent state is saved, ascending
        self.saved = 0  # tokens before the last state that was saved
        self.fetched = False  # whether files with the beginning of its tokens were read for it

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing is to be computed any more."""

    @property
    def known(self) -> Tokens:
        """The tokens so far."""
        return self.tokens[: self.length]

    @property
    def pending(self) -> int:
        """Tokens so far that are not in the sequence."""
        return self.length - self.computed

    @property
    def until_mark(self) -> int:
        """Tokens to compute before the next mark, or before the end of the prompt and what was produced."""
        return next((mark - self.computed for mark in self.marks if mark > self.computed), self.pending)

    @property
    def limit(self) -> int:
        """Tokens that it may come to."""
        return len(self.tokens)

    @abstractmethod
    def enter(self, vocab: int, limit: int) -> None:
        """It gets a sequence, the first time or again, and may come to `limit` tokens."""

    @abstractmethod
    def wanted(self, rows: int) -> int:
        """Of the next `rows` pending tokens the last so many want their logits."""

    @abstractmethod
    def take(self, logits: npt.NDArray[np.float32]) -> None:
        """The logits [wanted, vocab] of tokens that have been computed, but not counted yet; they are another step's
        afterwards.
        """

    def advance(self, rows: int) -> int:
        """So many more tokens are in its sequence; returns how many never were before."""
        self.computed += rows
        new = max(0, self.computed - self.reached)
        self.reached += new
        return new

    def fail(self, error: BaseException) -> None:
        """End it by an error."""
        self.error = error

    @abstractmethod
    def cancel(self) -> None:
        """End it as it is."""

    @abstractmethod
    def deliver(self) -> None:
        """Give the sink what it was not given yet."""


class Request(Job):
    """A prompt to complete. The sink gets its deltas; `completion` is whole with the last one.

    prompt: int32 [n]. params: checked already. text: None when the model has no tokenizer; then only token ids are
    produced. keep: whether its keys and values stay for a request whose prompt begins with the same tokens, and whether
    it looks for such, of running requests too. mask: of the grammar that the text must keep to. openings: of the parts
    of its chat.
    """

    def __init__(
        self,
        prompt: Tokens,
        params: SamplingParams,
        eos_ids: frozenset[int] = frozenset(),
        text: AnswerStream | None = None,
        index: int = 0,
        keep: bool = False,
        sample: int = 0,
        mask: TokenMask | None = None,
        openings: Openings = _NO_CHAT,
    ) -> None:
        super().__init__(prompt, params.priority)
        self.params = params
        self.keep = keep
        self.openings = openings
        self.completion = Completion(
            prompt.tolist(), logprobs=None if params.logprobs is None else [], index=index, sample=sample
        )
        self.deltas: deque[TextDelta] = deque()
        self.ends = (frozenset() if params.ignore_eos else eos_ids) | {*params.stop_token_ids}
        self.made = perf_counter()
        self._text = text
        self._mask = mask
        self._told = 0  # tokens that earlier deltas carried
        self.sampler: Sampler | None = None  # from its first admission on
        self.guesses = Guesses(PromptLookup())

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    def enter(self, vocab: int, limit: int) -> None:
        """It finishes if there is room for no token."""
        if limit == len(self.prompt):
            return self.finish("length")
        if self.sampler is None:
            self._clock("started")
            self.tokens = np.empty(limit, np.int32)
            self.tokens[: self.length] = self.prompt
            self.sampler = Sampler(self.params, self.prompt, vocab, self.ends, self.completion.sample, self._mask)

    def wanted(self, rows: int) -> int:
        return 1 + self.guessed if rows == self.pending + self.guessed else 0

    @property
    def opens_call(self) -> bool:
        """Whether its last token, which is not computed yet, opens a call of tools."""
        return self.openings.call is not None and self.tokens[self.length - 1] == self.openings.call

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that may follow, and fit with one more."""
        count = min(count, self.limit - self.length - 1)
        return self.guesses.draft(self.known, count) if count > 0 else []

    def place(self, guesses: Sequence[int]) -> None:
        """Have the next step compute guesses, too."""
        self.guessed = len(guesses)
        self.tokens[self.length : self.length + self.guessed] = guesses

    def take(self, logits: npt.NDArray[np.float32]) -> None:
        """Append the next token, chosen from the first row, and as long as that is what was guessed the next one, from
        the row of the guess. No further than to what opens a call, before which a recurrent state is saved.
        """
        assert self.sampler is not None
        guesses, self.guessed = self.tokens[self.length : self.length + self.guessed].tolist(), 0
        right = 0
        for row in logits:
            self.accept(*self.sampler.choose(row, self.known))
            true = right < len(guesses) and self.tokens[self.length - 1] == guesses[right]
            if self.finished or self.opens_call or not true:
                break
            right += 1
        self.computed += right
        if guesses:
            self.guesses.tell(len(guesses), right)

    def _clock(self, moment: str) -> None:
        self.completion.times = replace(self.completion.times, **{moment: perf_counter() - self.made})

    def accept(self, token: int, logprob: TokenLogprob | None) -> None:
        """Append a token; finish when it ends the text or the room is used up."""
        self.tokens[self.length] = token
        self.length += 1
        self.completion.token_ids.append(token)
        if len(self.completion.token_ids) == 1:
            self._clock("first_token")
        if logprob is not None and self.completion.logprobs is not None:
            self.completion.logprobs.append(logprob)
        if token in self.ends:
            return self.finish("stop")
        parts = self._text.push(token) if self._text else Parts()
        if (self._text and self._text.stopped) or (self._mask and self._mask.finished):
            return self.finish("stop", parts)
        if self.length == len(self.tokens):
            return self.finish("length", parts)
        if parts or not self._text:
            self._tell(parts)

    def finish(self, reason: FinishReason, parts: Parts = _NOTHING) -> None:
        """Give out the last text, whatever was held back included. A second call does nothing."""
        if self.finished:
            return
        if self._text:
            parts += self._text.finish(whole=reason == "stop")
            if self._text.stopped:
                reason = "stop"
        self._tell(parts, reason)
        self._clock("finished")
        self.completion.finish_reason = reason

    def cancel(self) -> None:
        self.finish("cancelled")

    def fail(self, error: BaseException) -> None:
        """The error comes in place of a last delta."""
        super().fail(error)
        self.completion.finish_reason = "cancelled"

    def deliver(self) -> None:
        while self.deltas:
            self.sink(self.deltas.popleft())
        if self.error is not None:
            self.sink(self.error)

    def _tell(self, parts: Parts, reason: FinishReason | None = None) -> None:
        completion = self.completion
        completion.text += parts.text
        completion.reasoning += parts.reasoning
        completion.tool_calls += parts.tool_calls
        fresh = tuple(completion.token_ids[self._told :])
        self._told = len(completion.token_ids)
        self.deltas.append(TextDelta(parts.text, fresh, reason, completion.index, parts.reasoning, parts.tool_calls))


class Score(Job):
    """A prompt of which every token is looked at, and not continued. The sink gets `result`."""

    result: Any

    @property
    def finished(self) -> bool:
        return self.error is not None or self.reached == len(self.prompt)

    def enter(self, vocab: int, limit: int) -> None:
        """There is nothing to prepare."""

    def wanted(self, rows: int) -> int:
        return max(0, self.computed + rows - self.reached)

    def cancel(self) -> None:
        self.fail(RequestError("scoring was cancelled"))

    def deliver(self) -> None:
        self.sink(self.result if self.error is None else self.error)


class LogitsScore(Score):
    """Next-token logits at every position, float32 [len(prompt), vocab]."""

    result: npt.NDArray[np.float32]

    def __init__(self, prompt: Tokens, vocab: int) -> None:
        super().__init__(prompt)
        try:
            self.result = np.empty((len(prompt), vocab), np.float32)
        except MemoryError:
            size = 4 * len(prompt) * vocab
            raise CapacityError(f"the logits of {len(prompt)} tokens need {size} bytes; give a shorter text") from None

    def take(self, logits: npt.NDArray[np.float32]) -> None:
        self.result[self.reached : self.reached + len(logits)] = logits


class LogprobScore(Score):
    """How likely each token of the prompt is after those before it: None for the first, which follows nothing.

    top: how many of the likeliest tokens are told beside.
    """

    result: list[TokenLogprob | None]

    def __init__(self, prompt: Tokens, top: int = 0) -> None:
        super().__init__(prompt)
        self.result = [None] if len(prompt) else []
        self._top = top

    def take(self, logits: npt.NDArray[np.float32]) -> None:
        following = self.prompt[self.reached + 1 : self.reached + 1 + len(logits)]
        for row, token in zip(logits, following.tolist(), strict=False):
            rank = 1 + int(np.count_nonzero(row > row[token]))
            self.result.append(replace(token_logprob(row, token, self._top), rank=rank))


def _nowhere(result: object) -> None:
    """The sink of what nobody waits for."""
