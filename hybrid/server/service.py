"""The model behind a server, and its life: loading, ready, draining; and what runs on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from time import time
from typing import Any, TypeVar

from hybrid.errors import RequestError
from hybrid.plan.text import summary_text
from hybrid.server.admission import Admission
from hybrid.server.clients import CLIENT, URGENT
from hybrid.server.config import ServerConfig
from hybrid.server.failures import log_failure
from hybrid.server.health import Health, close_in_time
from hybrid.server.metrics import Metrics
from hybrid.server.refusals import Refusal, internal
from hybrid.server.telemetry import Telemetry
from hybrid.serving.async_llm import AsyncLLM
from hybrid.serving.llm import LLM
from hybrid.serving.pool import PoolReport
from hybrid.serving.request import Request
from hybrid.serving.together import Piece
from hybrid.text.token_texts import TokenTexts

T = TypeVar("T")


class Service:
    """Lives on one event loop, which alone calls it unless something else is said. names: of the model."""

    def __init__(self, config: ServerConfig, names: Sequence[str], telemetry: Telemetry | None = None) -> None:
        self.config, self.names, self.telemetry = config, tuple(names), telemetry
        self.created = int(time())
        self.progress: tuple[str, int, int] | None = None  # of loading; any thread sets it
        self.draining = False
        self.abandoned = False  # an engine could not be closed
        self.health = Health(self)
        self._llm: AsyncLLM | None = None
        self._runs: set[Run] = set()
        self._attempts: dict[asyncio.Task[Any], Refusal | None] = {}  # with how they were ended
        self._workers = ThreadPoolExecutor(2, "hybrid-texts")
        self._text_worker = ThreadPoolExecutor(1, "hybrid-texts-alone")  # no completion waits for what it does
        self.metrics = Metrics(
            lambda: self.admission.running(), lambda: self.admission.waiting(), lambda: self.ready, self._prefixes
        )
        self.admission = Admission(config, self.metrics, lambda: self.places, self._require_open)
        self.token_texts = TokenTexts(None)

    def opened(self, llm: LLM) -> None:
        """The model is loaded."""
        self.token_texts = TokenTexts(llm.tokenizer)
        llm.observe(self.metrics.on_step)
        self._llm = AsyncLLM(llm)
        self.health.opened()

    def watch(self, reopen: Callable[[], LLM], on_lost: Callable[[BaseException], None]) -> None:
        """reopen: opens the engine anew, on another thread. on_lost: is called where that has failed."""
        self.health.reopen, self.health.on_lost = reopen, on_lost

    def _prefixes(self) -> PoolReport | None:
        return self._llm.llm.loop.prefix_report() if self._llm else None

    @property
    def ready(self) -> bool:
        return self._llm is not None and not self.draining and not self.health.failing

    @property
    def loading(self) -> bool:
        return self._llm is None

    @property
    def llm(self) -> AsyncLLM:
        """Raises Refusal while there is none."""
        if self._llm is None:
            raise Refusal(503, "the model is being loaded; try again later", code="loading")
        return self._llm

    @property
    def taken(self) -> int:
        """Completions that run or wait."""
        return self.admission.taken

    def _require_open(self) -> None:
        """Raise Refusal where nothing is taken."""
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down")
        _ = self.llm

    def described(self) -> list[str]:
        """The plan and the model, for people."""
        llm = self.llm.llm
        plan = llm.engine.plan
        return [summary_text(plan), f"{llm.describe()}; {plan.isa} on {plan.threads} thread{'s' * (plan.threads != 1)}"]

    @property
    def vocab(self) -> int:
        return self.llm.llm.engine.spec.vocab

    @property
    def places(self) -> int:
        """Sequences that are computed at once."""
        return self._llm.llm.engine.plan.sequences if self._llm else 0

    def check_model(self, name: str | None) -> str:
        """The name that a reply has. Raises Refusal for a model that is not here."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            message = f"there is no model of this name; there is: {', '.join(self.names)}"
            raise Refusal(404, message, param="model", code="model_not_found")
        return name

    async def prepare(self, make: Callable[[], T], text: bool = False) -> T:
        """What takes a while before anything is computed, on a thread of its own. text: within `text`. Raises
        Refusal.
        """
        workers = self._text_worker if text else self._workers
        try:
            return await asyncio.get_running_loop().run_in_executor(workers, make)
        except RequestError as error:
            raise Refusal.of(error) from None

    async def start(self, count: int, make: Callable[[AsyncLLM], list[Request]]) -> Run:
        """Let in so many completions, whose requests `make` makes on another thread. Raises Refusal."""
        self.admission.require_room(count)
        client = CLIENT.get()
        self.admission.take(client, count)
        try:
            requests = await self.prepare(partial(make, self.llm))
            if not URGENT.get() and any(request.priority < 0 for request in requests):
                message = "priority: below 0 is for keys that --api-key-file marks as urgent; give 0 or more"
                raise Refusal(403, message, param="priority")
            return Run(self, requests, count, client)
        except BaseException:
            self.admission.take(client, -count)
            raise

    async def attempt(self, make: Callable[[AsyncLLM], Awaitable[T]]) -> T:
        """What is awaited whole, for a run that was let in. Raises Refusal."""
        task = asyncio.ensure_future(make(self.llm))
        self._attempts[task] = None
        try:
            return await task
        except asyncio.CancelledError:
            if refusal := self._attempts[task]:
                raise refusal from None
            raise
        except Exception as error:
            raise self.refuse(error) from None
        finally:
            del self._attempts[task]

    def charge_running(self) -> None:
        """Count what was computed so far of what runs."""
        for run in self._runs:
            run.charge()

    def refuse(self, error: BaseException) -> Refusal:
        """What the client of a request is told that ended with an error. Not being able to compute is remembered."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, RequestError):
            return Refusal.of(error)
        log_failure(error)
        self.metrics.failed.inc()
        self.health.failed()
        return internal()

    def fail_all(self) -> None:
        """End all that runs or waits by an error: the engine cannot compute it."""
        self.metrics.failed.inc(len(self._runs) + len(self._attempts))
        self._end_all(internal)

    def _end_all(self, refusal: Callable[[], Refusal]) -> None:
        for run in list(self._runs):
            run.fail(refusal())
        for task in list(self._attempts):
            self._attempts[task] = refusal()
            task.cancel()

    def detach(self) -> LLM:
        """Take the engine away; what it has not finished fails."""
        llm, self._llm = self.llm.llm, None
        self.fail_all()
        return llm

    def dispose(self, llm: LLM) -> None:
        """Close an engine; any thread may call it."""
        if not close_in_time(llm):
            self.abandoned = True

    def enter(self, run: Run) -> None:
        self._runs.add(run)

    def leave(self, run: Run) -> None:
        self._runs.discard(run)
        self.admission.take(run.client, -run.count)
        run.charge()
        self.metrics.on_end([request.completion for request in run.requests])

    async def drain(self, seconds: float) -> None:
        """Take nothing more; wait for what runs, and after so long end it by an error."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.admission.idle.wait()
        self._end_all(lambda: Refusal(503, "the server is shutting down", code="shutting_down"))
        with suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self.admission.idle.wait()

    def close(self) -> None:
        """Give the model's memory back."""
        for workers in (self._workers, self._text_worker):
            workers.shutdown(wait=False, cancel_futures=True)
        self.health.end()
        if self._llm:
            self.dispose(self._llm.llm)
        if self.telemetry:
            self.telemetry.close()


class Run:
    """Completions that one client waits for. They count as taken until `next` has given the last piece, so that who
    has the whole answer may ask again, or until `close`, which must be called, ends what has not finished.
    """

    def __init__(self, service: Service, requests: list[Request], count: int, client: str) -> None:
        """Raises Refusal."""
        self.requests, self.count, self.service, self.client = requests, count, service, client
        self._charged = 0  # tokens that were counted for the client
        metrics = service.metrics
        for request in requests:
            request.client = client
        self._experts = (metrics.expert_hits, metrics.expert_misses)
        try:
            self._together = service.llm.start(requests)
        except RequestError:  # it is closed
            raise Refusal(503, "the server is shutting down", code="shutting_down") from None
        self._closed = False
        service.enter(self)

    async def next(self, seconds: float | None = None) -> list[Piece]:
        """As `Together.next`. Raises Refusal."""
        try:
            pieces = await self._together.next(seconds)
        except Exception as error:
            raise self.service.refuse(error) from None
        if self.over():
            self.close()
        return pieces

    async def finish(self) -> None:
        """Wait for all of it. Raises Refusal."""
        while not self.over():
            await self.next()

    def over(self) -> bool:
        return self._together.over()

    def fail(self, refusal: Refusal) -> None:
        self._together.fail(refusal)

    def expert_cache(self) -> dict[str, int] | None:
        """Hits and misses in the steps since it began, which others share; None without a cache."""
        metrics = self.service.metrics
        hits, misses = metrics.expert_hits - self._experts[0], metrics.expert_misses - self._experts[1]
        return {"hits": hits, "misses": misses} if self.service.llm.llm.engine.experts else None

    def charge(self) -> None:
        """Count what was computed for its client since this was done last."""
        computed = sum(map(_computed_tokens, self.requests))
        self.service.admission.quotas.charge(self.client, computed - self._charged)
        self._charged = computed

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._together.close()
            self.service.leave(self)


def _computed_tokens(request: Request) -> int:
    """Of its prompt and of its answer, whatever way it ended."""
    usage = request.completion.usage
    return max(0, min(request.reached, usage.prompt_tokens) - usage.cached_tokens) + usage.completion_tokens
