"""The Python API: a model that is loaded, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from numbers import Integral
from threading import RLock
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.config import EngineConfig, check_config
from hybrid.core import Completion, SamplingParams, TextDelta
from hybrid.engine.engine import Engine
from hybrid.errors import RequestError
from hybrid.plan.resolve import EMBEDDED_MODEL
from hybrid.serving.arguments import Arguments, configure, signed_by
from hybrid.serving.sampler import check_params
from hybrid.serving.scheduler import Request, Scheduler, StepRecord
from hybrid.settings import named_as_given
from hybrid.text.chat_template import ChatTemplate, Message, load_template
from hybrid.text.detokenizer import TextStream
from hybrid.text.tokenizer import Tokenizer, load_tokenizer, read_eos_ids

Prompt = str | Sequence[int]


class LLM:
    """A loaded model. A context manager; `close` gives its memory back.

    Threads may share one: their requests run in the same steps. The arguments are the fields of
    `EngineConfig`; the environment (`HYBRID_THREADS` for `threads`) has those that are not given. progress: called
    with (what, done, total) while loading. notice: called with one line that is worth telling. Raises the errors of
    `hybrid.errors`.
    """

    @signed_by(Arguments)
    def __init__(
        self,
        progress: Callable[[str, int, int], None] | None = None,
        notice: Callable[[str], None] | None = None,
        **given: Any,
    ) -> None:
        config, choices = configure(given)
        with named_as_given(choices):
            self._open(config, progress, notice)

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        progress: Callable[[str, int, int], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> LLM:
        """The same from a whole configuration."""
        llm = cls.__new__(cls)
        llm._open(config, progress, notice)
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
        llm._assemble(engine, tokenizer, eos_ids, template)
        return llm

    def _open(
        self,
        config: EngineConfig,
        progress: Callable[[str, int, int], None] | None,
        notice: Callable[[str], None] | None,
    ) -> None:
        check_config(config)
        path = config.model_path or EMBEDDED_MODEL
        tokenizer, template = load_tokenizer(path), load_template(path)
        eos_ids = read_eos_ids(path, tokenizer)
        self._assemble(Engine.open(config, progress, notice), tokenizer, eos_ids, template)

    def _assemble(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        eos_ids: frozenset[int],
        template: ChatTemplate | None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._template = template
        self._scheduler = Scheduler(engine)
        self._lock = RLock()
        self._closed = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and free the memory. A second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._scheduler.cancel_all()
                self.engine.close()

    def observe(self, on_step: Callable[[StepRecord], None] | None) -> None:
        """Have `on_step` called with the record of every step from now on; None ends it."""
        self._scheduler.on_step = on_step

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Complete one prompt or many; the completions come in the order of the prompts.

        A prompt is a text or a list of token ids. progress: called with (finished, total).
        """
        requests = [self._request(p, params, index) for index, p in enumerate(_prompt_list(prompts))]
        finished = 0
        for delta in self._run(requests):
            if progress and delta.finish_reason:
                finished += 1
                progress(finished, len(requests))
        return [request.completion for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[TextDelta, None, None]:
        """The completion of one prompt, piece by piece. Closing the iterator cancels it."""
        return self._run([self._request(prompt, params)])

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Completion:
        """The assistant's answer to messages like {"role": "user", "content": "..."}."""
        return self.generate(self.encode_chat(messages), params)[0]

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Generator[TextDelta, None, None]:
        """The same, piece by piece."""
        return self.stream(self.encode_chat(messages), params)

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Next-token logits at every position: float32 [len(token_ids), vocab]."""
        tokens = _token_array(token_ids)
        with self._lock:
            self._require_open()
            return self._scheduler.score(tokens)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Messages as the token ids of a prompt, by the model's chat template."""
        if self._template is None or self.tokenizer is None:
            raise RequestError("this model has no chat template; give a prompt (without --chat) instead of messages")
        return self.tokenizer.encode(self._template.render(messages), special_tokens=False)

    def _request(self, prompt: Prompt, params: SamplingParams | None, index: int = 0) -> Request:
        self._require_open()
        params = SamplingParams() if params is None else params
        check_params(params)
        tokens = _token_array(self._encode(prompt) if isinstance(prompt, str) else prompt)
        if not len(tokens) and self.tokenizer and self.tokenizer.bos_id is not None:
            tokens = _token_array([self.tokenizer.bos_id])
        self._scheduler.check(tokens)
        if params.stop and self.tokenizer is None:
            raise RequestError("this model has no tokenizer, so stop strings cannot be found; remove them")
        text = TextStream(self.tokenizer, params.stop) if self.tokenizer else None
        return Request(tokens, params, self._eos_ids, text, index)

    def _encode(self, prompt: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer: add its tokenizer.json, or give a list of token ids")
        return self.tokenizer.encode(prompt)

    def _run(self, requests: Sequence[Request]) -> Generator[TextDelta, None, None]:
        """Run steps until the requests have finished, giving out deltas. Cancels them when left early."""
        try:
            with self._lock:
                self._require_open()
                for request in requests:
                    self._scheduler.add(request)
            waiting = list(requests)
            while waiting:
                self._step(waiting)
                for request in waiting:
                    yield from _taken(request)
                waiting = [request for request in waiting if not request.finished]
        finally:
            with self._lock:
                for request in requests:
                    self._scheduler.cancel(request)

    def _step(self, requests: Sequence[Request]) -> None:
        """One step, unless another thread's steps have brought news of these requests meanwhile."""
        with self._lock:
            if not any(request.deltas for request in requests):
                self._require_open()
                self._scheduler.step()
        for request in requests:
            if request.error is not None:
                raise request.error

    def _require_open(self) -> None:
        if self._closed:
            raise RequestError("this LLM was closed; make a new one")


def _taken(request: Request) -> Iterator[TextDelta]:
    while request.deltas:
        yield request.deltas.popleft()


def _prompt_list(prompts: Any) -> list[Any]:
    """One text or one list of token ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) and not (isinstance(prompts, np.ndarray) and prompts.ndim):
        raise RequestError(f"prompts must be a text, a list of token ids or a list of these, not {prompts!r:.80}")
    return [prompts] if len(prompts) and isinstance(prompts[0], Integral) else list(prompts)


def _token_array(token_ids: Any) -> npt.NDArray[np.int32]:
    try:
        values = np.asarray(token_ids if len(token_ids) else np.empty(0, np.int32))
    except (TypeError, ValueError):  # no sequence, or lists of several lengths
        values = np.empty((0, 0))
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise RequestError(f"a prompt must be a text or a list of whole numbers, not {token_ids!r:.80}")
    wrong = values[(values < 0) | (values >= 2**31)]
    if len(wrong):
        raise RequestError(f"{wrong[0]} is not a token id; ids begin at 0 and are smaller than the vocabulary")
    return values.astype(np.int32)
