"""Steps of an engine that other threads may cut short."""

from __future__ import annotations

from collections.abc import Sequence
from threading import RLock, get_ident
from time import perf_counter
from typing import TYPE_CHECKING

from hybrid.core import Batch, StepResult
from hybrid.errors import RequestError, StepCancelled
from hybrid.serving.request import Job

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine


def closed_error() -> RequestError:
    return RequestError("this LLM was closed; make a new one")


class Stepper:
    """Runs the steps of a `Scheduler`. `cut` and `stop` may come from any thread, but from no finalizer: they lock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: Sequence[Job] = ()  # those of the running step
        self._begun: float | None = None  # when it began
        self._late = 0  # steps, at most, that may yet be ended by a cut that came too late for its own
        self._lock = RLock()  # held while another thread cancels a step, and while the engine is closed
        self._canceller: int | None = None  # the thread that cancels a step
        self._stopping = self._closed = False

    def forward(self, jobs: Sequence[Job], batch: Batch) -> StepResult:
        """`Engine.forward`, for these jobs. Raises RequestError once stopped."""
        with self._lock:  # a cut of the step before comes before this one begins, and so hits its first op
            self._jobs = jobs
        self._begun = perf_counter()
        try:
            while not self._stopping:
                try:
                    return self._engine.forward(batch)
                except StepCancelled:
                    if not self._stopping and self._meant(jobs):
                        raise
            raise closed_error()
        finally:
            self._jobs, self._begun = (), None

    @property
    def seconds(self) -> float:
        """How long the running step has taken; 0 if none runs."""
        begun = self._begun
        return 0.0 if begun is None else perf_counter() - begun

    def cut(self) -> bool:
        """End the running step if all its jobs are unwanted; returns whether no step of others runs."""
        with self._lock:
            jobs = self._jobs
            before, self._canceller = self._canceller, get_ident()
            try:
                if not all(job.unwanted for job in jobs):
                    return False
                if jobs:
                    self._cancel()
            finally:
                self._canceller = before
        return True

    def stop(self) -> None:
        """End the running step, and let there be no other."""
        self._stopping = True
        with self._lock:
            before, self._canceller = self._canceller, get_ident()
            try:
                if self._jobs:
                    self._cancel()
            finally:
                self._canceller = before

    @property
    def cancelling(self) -> bool:
        """Whether this thread is inside `cut` or `stop`: a finalizer that the collector calls there must not wait."""
        return self._canceller == get_ident()

    def close(self) -> None:
        """Close the engine; nothing may run any more."""
        with self._lock:
            self._closed = True
            self._engine.close()

    def _cancel(self) -> None:
        if not self._closed:
            # One for each op list that `Engine.cancel` marks. Those of before stay: a step may have been ended, and
            # marked once more before its thread has heard of that.
            self._late += 1 + bool(self._engine.device_step) + bool(self._engine.experts)
            self._engine.cancel()

    def _meant(self, jobs: Sequence[Job]) -> bool:
        """Whether a step that was cancelled should have been. One that should not has ended after its first op, which
        touches no state, and is run again.
        """
        late, self._late = self._late, max(0, self._late - 1)
        return not late or all(job.unwanted for job in jobs)
