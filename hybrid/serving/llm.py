"""The Python API: a model that is loaded, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar, Unpack, overload

import numpy as np
import numpy.typing as npt

from hybrid.config import EngineConfig, check_config
from hybrid.core import Completion, SamplingParams, TokenLogprob
from hybrid.engine.engine import Engine
from hybrid.files import is_file
from hybrid.files.gguf import is_gguf
from hybrid.plan.resolve import EMBEDDED_MODEL
from hybrid.serving.arguments import Arguments, configure, named_as_arguments, signed_by
from hybrid.serving.intake import Intake, Params, Prompt, check_callback, is_many
from hybrid.serving.loop import Loop
from hybrid.serving.perplexity import Perplexity, nats_of
from hybrid.serving.request import Limits, LogprobScore, Request, Score
from hybrid.serving.scheduler import StepRecord
from hybrid.serving.stream import Stream
from hybrid.serving.trace import record_trace
from hybrid.settings import named_as_given
from hybrid.text.answer_format import AnswerFormat, choose_format
from hybrid.text.chat_template import ChatTemplate, load_template
from hybrid.text.convert import CONVERTED, needs_conversion
from hybrid.text.gguf_texts import text_files
from hybrid.text.messages import ChatInput, ChatOptions, Message
from hybrid.text.tokenizer import Tokenizer, load_tokenizer, read_eos_ids
from hybrid.weights.hub import with_local_model

T = TypeVar("T")


@dataclass(frozen=True)
class Texts:
    """What a model directory says of texts: tokenizer, ends, chat template, and how answers are written."""

    tokenizer: Tokenizer | None
    eos_ids: frozenset[int]
    template: ChatTemplate | None
    answers: AnswerFormat | None = None


class LLM:
    """A loaded model. A context manager; `close` gives its memory back.

    Threads may share one: their requests run in the same steps, all on one thread of its own (`hybrid.serving.loop`).
    `AsyncLLM` shares it with asyncio. The arguments are the fields of `EngineConfig`; the environment
    (`HYBRID_THREADS` for `threads`) has those that are not given. progress: called with (what, done, total) while
    loading. notice: called with one line that is worth telling. Raises the errors of `hybrid.errors`.

    loop: the engine's thread, and what it tells of itself. intake: makes requests of what is asked.
    """

    @signed_by(Arguments)
    def __init__(
        self,
        progress: Callable[[str, int, int], None] | None = None,
        notice: Callable[[str], None] | None = None,
        **given: Any,
    ) -> None:
        config, choices = configure(given)
        with named_as_arguments(), named_as_given(choices):
            self._begin(*_open(config, progress, notice))

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        progress: Callable[[str, int, int], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> LLM:
        """The same from a whole configuration. Errors name flags, as the commands do."""
        llm = cls.__new__(cls)
        llm._begin(*_open(config, progress, notice))
        return llm

    @classmethod
    def from_engine(
        cls,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        eos_ids: frozenset[int] = frozenset(),
        template: ChatTemplate | None = None,
    ) -> LLM:
        """An LLM around an engine that is open already; closing the one closes the other."""
        llm = cls.__new__(cls)
        llm._begin("a model", engine, Texts(tokenizer, eos_ids, template))
        return llm

    def _begin(self, name: str, engine: Engine, texts: Texts) -> None:
        self._name = name
        self.engine = engine
        self.tokenizer = texts.tokenizer
        self._limits = Limits.of(engine)
        self.intake = Intake(self._limits, texts.tokenizer, texts.eos_ids, texts.template, texts.answers)
        self.loop = Loop(engine)

    def __repr__(self) -> str:
        plan, state = self.engine.plan, "closed" if self.loop.closed else "open"
        return (
            f"<LLM {self._name!r}, {plan.isa} on {plan.threads} thread{'s' * (plan.threads != 1)}, "
            f"{plan.sequences} sequences of up to {plan.max_seq_len} tokens, {state}>"
        )

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.close()
        if error is None:
            self.loop.raise_observer_error()

    def close(self) -> None:
        """Free the memory; who still waits for an answer gets a RequestError. A second call does nothing.

        Raises what an observer raised, if one did.
        """
        self.loop.close()
        self.loop.raise_observer_error()

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        return self._limits.tokens

    def describe(self) -> str:
        """One line: the model, its context, its formats, how its answers are written."""
        weights, answers = self.engine.plan.format_text, self.intake.answers
        return f"{self._name}: {weights}; context {self.max_tokens} tokens; answers {answers}"

    def observe(self, on_step: Callable[[StepRecord], None] | None) -> None:
        """Have `on_step` called with the record of every step from now on; None ends it.

        The engine's thread calls it. If it raises, no request notices: it is called no more, and the next `observe`
        raises the error, or `close`.
        """
        check_callback("on_step", on_step)
        self.loop.observe(on_step)

    def run(self, call: Callable[[], T]) -> T:
        """Call something between two steps, on the engine's thread; returns what it returns."""
        return self.loop.run(call)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or many; the completions come in the order of the prompts, `n` for each.

        A prompt is a text or a list of token ids. params: for all prompts, or a list with one for each. progress:
        called with (finished, total). Whatever it raises ends this call alone, as does Ctrl-C.
        """
        check_callback("progress", progress)
        self.loop.require_open()
        return _complete(self.loop, self.intake.requests(prompts, params), progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """The completion of one prompt, piece by piece. Closing the iterator cancels it."""
        self.loop.require_open()
        return Stream(self.loop, self.intake.request(prompt, params))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[Completion]: ...
    def chat(
        self,
        messages: Any,
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion | list[Completion]:
        """The assistant's answer to messages like {"role": "user", "content": "..."}; of a list of conversations, those
        to each, which are computed together.

        Reasoning and calls of tools are apart from the text; `Completion.message` is what the next question sends back.
        Without `max_tokens` an answer goes on to its end, or to that of the context. keep: keys and values stay, so
        that a call whose messages go on from these computes only what is new; `forget` frees them. progress: as for
        `generate`. options: what the chat template takes besides, `tools`, `documents` and `template_kwargs`:
        `ChatTemplate.render` says what they are.
        """
        chat = ChatInput(messages, **options)
        self.loop.require_open()
        check_callback("progress", progress)
        completions = _complete(self.loop, self.intake.chat_requests(chat, params, keep), progress)
        return completions if is_many(chat) else completions[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """The answer of one conversation, piece by piece."""
        chat = ChatInput(messages, **options)
        self.loop.require_open()
        return Stream(self.loop, self.intake.chat_request(chat, params, keep=keep))

    def forget(self) -> None:
        """Free the keys and values that chats have kept."""
        self.loop.forget()

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """The token ids of a text; special_tokens: with those that the tokenizer adds, such as one that begins it."""
        return [int(token) for token in self.intake.encode(text, special_tokens)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without that of special tokens."""
        return self.intake.decode(token_ids)

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Next-token logits at every position: float32 [len(token_ids), vocab]."""
        self.loop.require_open()
        score = self.intake.logits_score(token_ids)
        _compute(self.loop, score)
        return score.result

    def score(self, prompt: Prompt, top: int = 0) -> list[TokenLogprob | None]:
        """How likely each token of a prompt is after those before it; None for the first. top: how many of the
        likeliest tokens are told beside each.
        """
        self.loop.require_open()
        score = self.intake.logprob_score(prompt, top)
        _compute(self.loop, score)
        return score.result

    def perplexity(
        self,
        text: Prompt,
        window: int | None = None,
        stride: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Perplexity:
        """How well the model foretells a text or a list of token ids.

        Every token but the first is scored once. A window holds `window` tokens (None: 2048, or the longest sequence if
        that is shorter), and the next one begins `stride` further (None: half a window): so a token is foretold from at
        least `window - stride` others, but for those at the beginning of the text. progress: called with (windows done,
        all windows).
        """
        check_callback("progress", progress)
        self.loop.require_open()
        tokens, windows, size = self.intake.windows(text, window, stride)
        nats = 0.0
        for done, part in enumerate(windows, start=1):
            score = LogprobScore(tokens[part.first : part.last])
            _compute(self.loop, score)
            nats += nats_of(part, score.result)
            if progress:
                progress(done, len(windows))
        return Perplexity(len(tokens) - 1, len(windows), windows.window, windows.stride, nats, size)

    def record_trace(
        self, path: str | Path, notice: Callable[[str], None] | None = None
    ) -> AbstractContextManager[None]:
        """Write which experts every token takes, while the block runs, to a file that `hybrid simulate` and `hybrid
        plot` read: .csv or .parquet. The model must have been opened with `routes=True` or have an expert cache.

        Steps go on when the file cannot be written on: notice is told in one line, or without one the end of the block
        raises CapacityError. Raises ConfigError for a place where nothing can be written.
        """
        return record_trace(self.loop, self.engine, Path(path), notice)

    def encode_chat(
        self,
        messages: Sequence[Message],
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """Messages as the token ids of a prompt, by the model's chat template."""
        return self.intake.encode_chat(ChatInput(messages, **options))


def last_only(put: Callable[[Any], None]) -> Callable[[Any], None]:
    """A sink of deltas that passes on the last one of a request, or its error."""

    def sink(item: Any) -> None:
        if isinstance(item, BaseException) or item.finish_reason is not None:
            put(item)

    return sink


def _complete(
    loop: Loop, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
) -> list[Completion]:
    answers: SimpleQueue[Any] = SimpleQueue()
    for request in requests:
        request.sink = last_only(answers.put)
    try:
        loop.submit(requests)
        for finished in range(1, len(requests) + 1):
            loop.wait(answers)
            if progress:
                progress(finished, len(requests))
    finally:
        loop.cancel(requests)
    return [request.completion for request in requests]


def _compute(loop: Loop, score: Score) -> None:
    """Wait until it has its result."""
    if score.finished:
        return
    answers: SimpleQueue[Any] = SimpleQueue()
    score.sink = answers.put
    try:
        loop.submit([score])
        loop.wait(answers)
    finally:
        loop.cancel([score])


def _open(
    config: EngineConfig,
    progress: Callable[[str, int, int], None] | None,
    notice: Callable[[str], None] | None,
) -> tuple[str, Engine, Texts]:
    """The name of a model, its engine, and what it says of texts."""
    check_config(config)
    config = with_local_model(config, progress)
    path = config.model_path or EMBEDDED_MODEL
    # Files that have to be converted are known only once there is a store; all others are wrong before it is made.
    texts = None if needs_conversion(path) else _read_texts(path, config, None, notice)
    engine = Engine.open(config, progress, notice)
    try:
        name = path.absolute().name if config.model_path else "the embedded model"
        return name, engine, texts or _read_texts(path, config, engine.store.path, notice)
    except BaseException:
        engine.close()
        raise


def _read_texts(
    path: Path, config: EngineConfig, store_path: Path | None = None, notice: Callable[[str], None] | None = None
) -> Texts:
    if store_path and is_gguf(path):
        if not is_file(store_path / CONVERTED):
            text_files(path)  # says what is wrong with them
        path = store_path
    tokenizer, template = load_tokenizer(path, store_path, notice), load_template(path)
    source, tokens = template.sources if template else "", tokenizer.added if tokenizer else ()
    answers = choose_format(source, tokens, config.reasoning_parser, config.tool_parser)
    return Texts(tokenizer, read_eos_ids(path, tokenizer), template, answers)
