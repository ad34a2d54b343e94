"""Whether steps of the engine succeed, and what is done where they do not: they are tried, and the engine is opened
once more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from hybrid.core import SamplingParams
from hybrid.server.failures import log_failure
from hybrid.serving.llm import LLM

if TYPE_CHECKING:
    from hybrid.server.service import Service

_PROBE_SECONDS = 1.0  # between tries whether steps succeed again
_CLOSE_SECONDS = 20.0  # after which an engine that does not close is left to itself
_LOOK_SECONDS = 0.1  # between looks whether any step has succeeded
_LOOKS = 20  # at a running step, in the time that it may take
logger = logging.getLogger("hybrid.server")


class Health:
    """Lives on the event loop of its service. failing: a step has failed or is stuck, and none has succeeded since.

    reopen: opens the engine anew, on another thread; None: that cannot be done. on_lost: called where it has failed.
    """

    def __init__(self, service: Service) -> None:
        self.failing = False
        self.reopen: Callable[[], LLM] | None = None
        self.on_lost: Callable[[BaseException], None] = lambda error: None
        self._service = service
        self._cure: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    def opened(self) -> None:
        """There is an engine, whose steps are watched from now on."""
        if self._watch:
            self._watch.cancel()
        self._watch = asyncio.ensure_future(self._watch_steps())

    def failed(self) -> None:
        """A step has failed or is stuck."""
        self.failing = True
        if self._cure is None or self._cure.done():
            self._cure = asyncio.ensure_future(self._recover())

    def end(self) -> None:
        """Nothing is watched or tried any more."""
        for task in (self._watch, self._cure):
            if task:
                task.cancel()

    @property
    def _stuck(self) -> bool:
        return self._service.llm.llm.loop.step_seconds() > self._service.config.step_seconds

    async def _watch_steps(self) -> None:
        while not self._stuck:
            await asyncio.sleep(self._service.config.step_seconds / _LOOKS)
        logger.error("a step of the engine takes more than --step-seconds %g", self._service.config.step_seconds)
        self._service.fail_all()
        self.failed()

    async def _recover(self) -> None:
        """A step of our own tells whether steps succeed again; where it does not, the engine is opened anew, once."""
        reopened = False
        while self.failing and not self._service.draining:
            await asyncio.sleep(_PROBE_SECONDS)
            if await self._steps_succeed():
                self.failing = False
                self.opened()
            elif self.reopen and not reopened:
                reopened = True
                if not await self._open_anew(self.reopen):
                    return

    async def _steps_succeed(self) -> bool:
        """Of whomever: a step of our own may have to wait for a place."""
        if self._stuck:
            return False
        before, limit = self._service.metrics.steps, self._service.config.step_seconds
        probe = asyncio.ensure_future(self._service.llm.generate([[0]], SamplingParams(max_tokens=1)))
        try:
            async with asyncio.timeout(limit):
                while not probe.done() and self._service.metrics.steps == before:
                    await asyncio.wait([probe], timeout=_LOOK_SECONDS)
        except TimeoutError:
            return False
        finally:
            probe.cancel()
        succeeded = probe.done() and probe.exception() is None
        return succeeded or self._service.metrics.steps > before

    async def _open_anew(self, reopen: Callable[[], LLM]) -> bool:
        logger.error("steps go on failing: the engine is closed and opened anew")
        service, loop = self._service, asyncio.get_running_loop()
        service.metrics.reopened.inc()
        if self._watch:
            self._watch.cancel()
        old = service.detach()
        await loop.run_in_executor(None, service.dispose, old)
        try:
            service.opened(await loop.run_in_executor(None, reopen))
        except Exception as error:
            log_failure(error)
            self.on_lost(error)
            return False
        return True


def close_in_time(llm: LLM) -> bool:
    """Close it; returns whether that has come to an end. Otherwise it is abandoned."""
    thread = threading.Thread(target=llm.close, name="hybrid-close", daemon=True)
    thread.start()
    thread.join(_CLOSE_SECONDS)
    ended = not thread.is_alive()
    if not ended:
        llm.loop.abandon()  # which ends that thread
    return ended
