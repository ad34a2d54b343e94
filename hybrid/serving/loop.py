"""The engine's thread: it alone runs steps. Requests are handed in and deltas come out through queues.

The engine is opened by whoever asks for it, and from then on stepped and closed by this thread. So `on_step` and
observers of the engine are called on it too; they must not wait for a thread that waits for this `Loop`. Nothing of a
step depends on the thread: torch's modes, streams and nvtx ranges are entered in each step, and Python's signals reach
the main thread alone, which waits in a queue meanwhile.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from hybrid.errors import CapacityError, KernelError, RequestError, forked_error
from hybrid.serving.pool import PoolReport
from hybrid.serving.relief import CHECK_SECONDS
from hybrid.serving.request import Job
from hybrid.serving.scheduler import Scheduler, StepRecord
from hybrid.serving.stepper import Stepper, closed_error

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

T = TypeVar("T")
SIGNAL_SECONDS = 0.1  # after which the main thread sees a signal that did not wake it


class Loop:
    """The engine's thread as callers see it: any number of threads, and of event loops.

    A caller gives a job a sink, submits it, and waits for what the sink is given. The thread ends by `close`, when
    nobody holds the Loop any more, and before the interpreter ends. In a process that was forked everything but
    `close` raises KernelError.
    """

    def __init__(self, engine: Engine) -> None:
        """Raises CapacityError if the system refuses a thread."""
        self._worker = _Worker(engine)
        self._worker.start()
        self._collected = weakref.finalize(self, self._worker.commands.put, None)
        self._collected.atexit = False  # `_end_all` does more

    def require_open(self) -> None:
        """Raise RequestError once closed, KernelError in a forked process."""
        worker = self._worker
        worker.require_process()
        if worker.ended:
            if worker.exiting and threading.current_thread().daemon:
                threading.Event().wait()  # the process ends, and with it this thread: it has nobody to tell
            raise closed_error()

    @property
    def closed(self) -> bool:
        """Whether it was closed, or this process was forked."""
        return self._worker.ended or os.getpid() != self._worker.process

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, which are admitted together. Raises RequestError on the engine's thread, which cannot wait."""
        self.require_open()
        if not self._may_wait:
            raise RequestError("a callback of the engine cannot ask it for more, for it would wait for itself")
        self._post(_Command(partial(self._worker.add, jobs), partial(self._worker.refuse, jobs)))

    def wait(self, answers: SimpleQueue[Any]) -> Any:
        """The next that a sink was given; raised if it is an error. Signals interrupt it."""
        self._worker.require_process()
        answer = _interruptible(answers) if threading.current_thread() is threading.main_thread() else answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def drop(self, jobs: Sequence[Job]) -> None:
        """Cancel jobs between two steps. Never waits nor locks: finalizers call it, at any place of any thread."""
        for job in jobs:
            job.unwanted = True
        self._worker.commands.put(_Command(partial(self._worker.cancel, jobs)))

    def leave(self, jobs: Sequence[Job]) -> bool:
        """Cancel jobs, and end the running step if it is theirs alone. False: a step of others runs, and ends first."""
        jobs = [job for job in jobs if not job.finished]
        if jobs and os.getpid() == self._worker.process:
            self.drop(jobs)
            return self._worker.stepper.cut()
        return True

    def cancel(self, jobs: Sequence[Job]) -> None:
        """`leave`, and wait until their sequences are free; unless a step of others runs."""
        finished = all(job.finished for job in jobs)
        if not finished and self.leave(jobs) and self._may_wait:
            with suppress(RequestError, KernelError):
                self.run(_nothing)

    def run(self, call: Callable[[], T]) -> T:
        """Have this called by the engine's thread between two steps; returns what it returns."""
        if self._inside:
            return call()
        results: list[T] = []
        answers: SimpleQueue[Any] = SimpleQueue()  # not a Future, which locks: finalizers may come to wait in there
        self.post(lambda: results.append(call()), answers.put)
        self.wait(answers)
        return results[0]

    def post(self, call: Callable[[], object], sink: Callable[[BaseException | None], object]) -> None:
        """The same without waiting: the sink is given None when it has been called, or the error."""
        self.require_open()
        if self._worker.stepper.cancelling:
            raise RequestError("a finalizer cannot ask the engine for anything; call close() or leave the with block")
        self._post(_Command(partial(_answer, sink, call), partial(_give, sink)))

    def forget(self) -> None:
        """Free what requests have left behind."""
        self.run(self._worker.scheduler.forget)

    def kept_lengths(self) -> list[int]:
        """Tokens of each sequence that a request has left behind, least recently used first."""
        return self.run(lambda: self._worker.scheduler.kept_lengths)

    def prefix_report(self) -> PoolReport:
        """What is kept of prompts beyond the sequences."""
        return self._worker.scheduler.prefix_report

    def step_seconds(self) -> float:
        """How long the running step has taken; 0 if none runs. Never waits."""
        return self._worker.stepper.seconds

    def running_tokens(self) -> int:
        """Tokens of the running requests whose keys and values are computed."""
        return self.run(lambda: self._worker.scheduler.running_tokens)

    def observe(self, on_step: Callable[[StepRecord], None] | None) -> None:
        """Have it called with the record of every step. Raises what the one before raised, which ended it then."""
        self.run(partial(setattr, self._worker.scheduler, "on_step", on_step))
        self.raise_observer_error()

    def raise_observer_error(self) -> None:
        """What an observer of steps has raised, once."""
        scheduler = self._worker.scheduler
        error, scheduler.observer_error = scheduler.observer_error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Cut the running step, fail every job by RequestError, close the engine. A second call waits for the first.

        Called by the engine's thread it does not wait, nor in a finalizer that interrupts a cancellation. In a forked
        process it does nothing: the engine is the parent's.
        """
        worker = self._worker
        if os.getpid() != worker.process:
            return
        worker.closing = True
        worker.stop()
        if self._may_wait:
            worker.thread.join()
            error, worker.close_error = worker.close_error, None
            if error is not None:
                raise error

    def abandon(self) -> None:
        """Have an engine that does not close leave to another one what only one can have. Never waits."""
        self._worker.scheduler.abandon()

    @property
    def _inside(self) -> bool:
        return threading.get_ident() == self._worker.thread.ident

    @property
    def _may_wait(self) -> bool:
        """Whether the engine's thread does not wait for this one."""
        return not (self._inside or self._worker.stepper.cancelling)

    def _post(self, command: _Command) -> None:
        """The thread may end meanwhile: either it sees the command, or we see that it has ended."""
        self._worker.commands.put(command)
        self.require_open()


@dataclass(frozen=True)
class _Command:
    """Something to do between two steps. refuse: called with the error that keeps it from being done."""

    call: Callable[[], object]
    refuse: Callable[[BaseException], object] = lambda error: None

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.refuse(error)


class _Worker:
    """What the thread itself holds. It knows no `Loop`, so that one which nobody else holds is collected."""

    def __init__(self, engine: Engine) -> None:
        self.process = os.getpid()
        self.commands: SimpleQueue[_Command | None] = SimpleQueue()  # whose `put` is safe in finalizers; None: end
        self.stepper = Stepper(engine)
        self.scheduler = Scheduler(engine, self.stepper.forward)
        self.closing = False  # the engine is to be closed
        self.exiting = False  # the interpreter ends: only daemon threads can still wait, and they need no answer
        self.ended = False
        self.close_error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="hybrid-engine", daemon=True)

    def start(self) -> None:
        atexit.unregister(_end_all)
        atexit.register(_end_all)  # the last hook is called first: before those of what the engine has loaded
        _running.add(self)
        try:
            self.thread.start()
        except RuntimeError as error:
            _running.discard(self)
            raise CapacityError(f"{error}; raise the limit on processes") from None

    def require_process(self) -> None:
        if os.getpid() != self.process:
            raise forked_error()

    def add(self, jobs: Sequence[Job]) -> None:
        self.scheduler.add(*jobs)

    def refuse(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            job.fail(error)
        self._deliver(jobs)

    def cancel(self, jobs: Sequence[Job]) -> None:
        jobs = [job for job in jobs if not job.finished]
        for job in jobs:
            self.scheduler.cancel(job)
        self._deliver(jobs)  # another thread may wait for it

    def stop(self) -> None:
        self.stepper.stop()
        self.commands.put(None)

    def _run(self) -> None:
        try:
            while self._obey():
                self._step()
        finally:
            self._end()

    def _obey(self) -> bool:
        """Do what was asked for; sleeps while there is nothing to compute. False: end."""
        while not (self.commands.empty() and self.scheduler.has_work):
            if os.getpid() != self.process:  # forked by a callback
                return False
            try:
                command = self.commands.get(timeout=CHECK_SECONDS if self.scheduler.holds_any else None)
            except Empty:
                self.scheduler.rest()
                continue
            if command is None:
                return False
            command.run()
            del command  # or it would hold what it is about while the thread sleeps
            if not self.scheduler.has_work and self.scheduler.holds_any:  # who asks often must not keep it from resting
                self.scheduler.rest()
        return True

    def _step(self) -> None:
        try:
            jobs = self.scheduler.step()
        except BaseException as error:  # whatever it is, nobody waits for ever
            jobs = self.scheduler.fail_all(error)
        self._deliver(jobs)

    def _deliver(self, jobs: Sequence[Job]) -> None:
        for job in jobs if not self.exiting else ():
            try:
                job.deliver()
            except Exception:  # its event loop was closed
                self.scheduler.cancel(job)

    def _end(self) -> None:
        self.ended = True  # from now on nobody hands in anything that is not refused, see `Loop._post`
        error = closed_error()
        self._deliver(self.scheduler.fail_all(error))
        while not self.commands.empty():
            command = self.commands.get()
            if command is not None and not self.exiting:
                command.refuse(error)
        self.scheduler.close()
        if self.closing:
            try:
                self.stepper.close()
            except BaseException as failure:
                self.close_error = failure
        _running.discard(self)


_running: set[_Worker] = set()


def _end_all() -> None:
    """A thread that came back from C++ after the interpreter has ended would abort the process; so Ctrl-C does not
    keep this from waiting.
    """
    workers = [worker for worker in list(_running) if worker.process == os.getpid()]
    while any(worker.thread.is_alive() for worker in workers):
        try:
            for worker in workers:
                worker.exiting = worker.closing = True
                worker.stop()
            for worker in workers:
                worker.thread.join()
        except KeyboardInterrupt:
            continue


def _interruptible(answers: SimpleQueue[Any]) -> Any:
    """A signal that comes just before the wait, or to another thread, does not end it: the main thread looks."""
    while True:
        try:
            return answers.get(timeout=SIGNAL_SECONDS)
        except Empty:
            continue


def _nothing() -> None:
    """Waiting for it is waiting for all that was asked for before."""


def _answer(sink: Callable[[BaseException | None], object], call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException as error:
        _give(sink, error)
    else:
        _give(sink, None)


def _give(sink: Callable[[BaseException | None], object], answer: BaseException | None) -> None:
    with suppress(Exception):  # its event loop was closed
        sink(answer)
