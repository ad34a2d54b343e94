"""The Python API for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar, Unpack, overload

import numpy as np
import numpy.typing as npt

from hybrid.core import Completion, SamplingParams, TextDelta, TokenLogprob
from hybrid.errors import HybridError
from hybrid.serving.answers import Answers
from hybrid.serving.intake import Intake, Params, Prompt, check_callback, is_many
from hybrid.serving.llm import LLM, last_only
from hybrid.serving.loop import Loop
from hybrid.serving.request import Job, Request, Score
from hybrid.serving.together import Together
from hybrid.text.messages import ChatInput, ChatOptions, Message

T = TypeVar("T")


class AsyncLLM:
    """An LLM whose answers are awaited; threads may go on using the LLM. An async context manager.

    Cancelling a task that waits cancels its requests: they leave within one step, at once if the step is theirs alone.
    Loading takes a while: `AsyncLLM(await asyncio.to_thread(LLM, "path/to/model"))` in an event loop that runs.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._intake, self._loop = llm.intake, llm.loop

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.llm.__exit__, kind, error, trace)

    async def aclose(self) -> None:
        """Close the LLM, see there."""
        await asyncio.to_thread(self.llm.close)

    @property
    def intake(self) -> Intake:
        """Makes the requests that `start` takes; on any thread."""
        return self._intake

    def start(self, requests: Sequence[Request]) -> Together:
        """Have requests computed together, whose pieces come as they are made."""
        return Together(self._loop, requests)

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """As `LLM.generate`; progress is called by the event loop."""
        check_callback("progress", progress)
        self._loop.require_open()
        return await self._complete(self._intake.requests(prompts, params), progress)

    async def _complete(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Completion]:
        answers = Answers()
        for request in requests:
            request.sink = last_only(answers.put)
        try:
            self._loop.submit(requests)
            for finished in range(1, len(requests) + 1):
                await answers.get()
                if progress:
                    progress(finished, len(requests))
        finally:
            self._loop.leave(requests)
        return [request.completion for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncStream:
        """As `LLM.stream`, for `async for`."""
        self._loop.require_open()
        return AsyncStream(self._loop, self._intake.request(prompt, params))

    @overload
    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Completion: ...
    @overload
    async def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        **options: Unpack[ChatOptions],
    ) -> list[Completion]: ...
    async def chat(
        self,
        messages: Any,
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Completion | list[Completion]:
        """As `LLM.chat`."""
        chat = ChatInput(messages, **options)
        self._loop.require_open()
        completions = await self._complete(self._intake.chat_requests(chat, params, keep))
        return completions if is_many(chat) else completions[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        keep: bool = False,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream:
        """As `LLM.stream_chat`, for `async for`."""
        chat = ChatInput(messages, **options)
        self._loop.require_open()
        return AsyncStream(self._loop, self._intake.chat_request(chat, params, keep=keep))

    async def run(self, call: Callable[[], T]) -> T:
        """As `LLM.run`."""
        results: list[T] = []
        answers = Answers()
        self._loop.post(lambda: results.append(call()), answers.put)
        await answers.get()
        return results[0]

    async def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """As `LLM.logits`."""
        self._loop.require_open()
        score = self._intake.logits_score(token_ids)
        await self._compute(score)
        return score.result

    async def score(self, prompt: Prompt, top: int = 0, client: str = "") -> list[TokenLogprob | None]:
        """As `LLM.score`. client: whose it is, for fairness."""
        self._loop.require_open()
        score = self._intake.logprob_score(prompt, top)
        score.client = client
        await self._compute(score)
        return score.result

    async def _compute(self, score: Score) -> None:
        if score.finished:
            return
        answers = Answers()
        score.sink = answers.put
        try:
            self._loop.submit([score])
            await answers.get()
        finally:
            self._loop.leave([score])

    def encode_chat(
        self,
        messages: Sequence[Message],
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """As `LLM.encode_chat`."""
        return self._intake.encode_chat(ChatInput(messages, **options))


class AsyncStream(AsyncIterator[TextDelta]):
    """The pieces of one completion, as `Stream` gives them to threads: the request begins with the first `anext`, and
    closing, cancelling or dropping the stream ends it.
    """

    def __init__(self, loop: Loop, request: Request) -> None:
        self._loop, self._request = loop, request
        self._answers: Answers | None = None
        self._over = False

    async def __anext__(self) -> TextDelta:
        if self._over:
            raise StopAsyncIteration
        try:
            if self._answers is None:
                self._answers = Answers()
                self._request.sink = self._answers.put
                self._loop.submit([self._request])
            delta: TextDelta = await self._answers.get()
        except BaseException:
            self._over = True
            self._loop.leave(self._begun)
            raise
        self._over = delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """Cancel the request unless it has finished, and wait until its sequence is free."""
        self._over = True
        if any(not job.finished for job in self._begun):
            self._loop.leave(self._begun)
            with suppress(HybridError):
                answers = Answers()
                self._loop.post(lambda: None, answers.put)
                await answers.get()

    @property
    def _begun(self) -> list[Job]:
        return [self._request] if self._answers else []

    def __del__(self) -> None:
        if getattr(self, "_answers", None) and not self._request.finished:
            self._loop.drop([self._request])
