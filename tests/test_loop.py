"""The engine's thread at its worst moments. Steps of a gated engine wait for the test: nothing is left to chance."""

from __future__ import annotations

import gc
import threading
import weakref
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
from dummy_engine import DummyEngine, GatedEngine, reference_tokens
from loop_rig import FOUR, callers_fixture, engine_fixture, in_time, llm_fixture, settle, settle_steps, tokens  # noqa: F401

from hybrid import LLM, SamplingParams
from hybrid.errors import CapacityError, DeviceFailed, KernelError, RequestError, StepCancelled
from hybrid.serving import scheduler as scheduling
from hybrid.serving.loop import Loop
from hybrid.serving.scheduler import StepRecord
from hybrid.serving.stepper import Stepper


def test_requests_join_the_steps_of_those_that_run(llm: LLM, engine: GatedEngine, callers) -> None:
    first = callers.submit(tokens, llm, [1])
    assert engine.rows() == 1
    second = callers.submit(tokens, llm, [2, 3])
    while llm.loop._worker.commands.empty():  # until it has been handed in
        pass
    engine.permit(99)
    assert [engine.rows() for _ in range(3)] == [3, 2, 2]
    assert in_time(first) == reference_tokens([1], 4) and in_time(second) == reference_tokens([2, 3], 4)


def test_an_idle_thread_sleeps_and_wakes(llm: LLM, engine: GatedEngine) -> None:
    engine.permit(8)
    assert tokens(llm, [1]) == reference_tokens([1], 4)
    settle(llm)
    assert tokens(llm, [2]) == reference_tokens([2], 4)
    assert len(engine.steps) == 8


def test_pieces_come_as_they_are_made_and_the_engine_waits_for_nobody(llm: LLM, engine: GatedEngine) -> None:
    stream = llm.stream([1], FOUR)
    assert not engine.began.qsize()  # it begins with the first piece
    engine.permit(1)
    assert next(stream).token_ids == tuple(reference_tokens([1], 1))
    engine.permit(3)
    settle_steps(engine, 4)
    assert [delta.token_ids[0] for delta in stream] == reference_tokens([1], 4)[1:]


def test_closing_a_stream_ends_the_step_that_is_its_alone(llm: LLM, engine: GatedEngine) -> None:
    stream = llm.stream([1], FOUR)
    engine.permit(1)
    next(stream)
    settle_steps(engine, 2)
    stream.close()
    assert engine.cancels == 1 and not engine.sequences
    engine.permit(4)
    assert tokens(llm, [2]) == reference_tokens([2], 4)


def test_closing_a_stream_leaves_a_step_of_others_alone(llm: LLM, engine: GatedEngine, callers) -> None:
    stream = llm.stream([1], FOUR)
    engine.permit(1)
    next(stream)
    other = joined(callers, llm, engine, [2, 3])
    stream.close()  # does not wait for that step
    assert engine.cancels == 0 and not other.done()
    engine.permit(99)
    assert engine.rows() == 1  # within one step
    assert in_time(other) == reference_tokens([2, 3], 4)


def joined(callers, llm: LLM, engine: GatedEngine, prompt: list[int]):
    """Another thread's request whose rows a step that waits has, beside one of a request that decodes."""
    engine.rows()
    engine.rows()  # that of the first alone
    other = callers.submit(tokens, llm, prompt)
    while llm.loop._worker.commands.empty():
        pass
    engine.permit(1)
    assert engine.rows() == 1 + len(prompt)
    return other


def test_a_cut_that_comes_too_late_harms_nobody(engine: GatedEngine, callers) -> None:
    class TooLate(GatedEngine):
        def cancel(self) -> None:
            if not self.cancels:
                self.permit(1)  # the step has ended before
            super().cancel()

    engine = TooLate()
    with LLM.from_engine(engine) as llm:
        stream = llm.stream([1], FOUR)
        engine.permit(1)
        next(stream)
        settle_steps(engine, 2)
        stream.close()
        assert engine.cancels == 1
        other = callers.submit(tokens, llm, [2])
        engine.permit(4)
        assert in_time(other) == reference_tokens([2], 4)
        settle_steps(engine, 5)  # one of them began twice


def test_a_step_that_is_cut_twice_leaves_nothing_to_others() -> None:
    """The first cut ends it; the second comes before its thread has heard of that, and meets the step of others."""

    class Engine:
        device_step = experts = None
        marked, steps = False, 0

        def cancel(self) -> None:
            self.marked = True

        def forward(self, batch: str) -> str:
            self.steps += 1
            if batch == "of who left":
                stepper.cut()
            marked, self.marked = self.marked, False
            if batch == "of who left":
                stepper.cut()
            if marked:
                raise StepCancelled("cancelled")
            return batch

    engine = Engine()
    stepper = Stepper(engine)
    with pytest.raises(StepCancelled):
        stepper.forward([SimpleNamespace(unwanted=True)], "of who left")
    assert stepper.forward([SimpleNamespace(unwanted=False)], "of who stays") == "of who stays"
    assert engine.steps == 3  # one of them began twice


def test_a_stream_that_the_collector_closes_inside_a_step_breaks_nobody(llm: LLM, engine: GatedEngine, monkeypatch):
    class Session:
        pass

    session = Session()
    session.stream, session.itself = llm.stream([1], FOUR), session
    engine.permit(1)
    next(session.stream)
    settle_steps(engine, 2)
    request = weakref.ref(session.stream._request)
    batch = scheduling.make_batch
    monkeypatch.setattr(scheduling, "make_batch", lambda chunks: (gc.collect(), batch(chunks))[1])
    gc.disable()
    try:
        del session
        engine.permit(99)
        assert tokens(llm, [2, 3]) == reference_tokens([2, 3], 4)
        assert len(llm.generate([[4], [5]], FOUR)) == 2
    finally:
        gc.enable()
    settle(llm)
    assert request() is None and not engine.sequences


class OnCollection:
    """Garbage in a cycle that calls something when it is collected, as a generator around a stream would."""

    def __init__(self, call) -> None:
        self.call, self.itself = call, self

    def __del__(self) -> None:
        self.call()


@pytest.mark.parametrize("use", ["close", "generate", "run", "close the model"])
def test_a_finalizer_that_waits_does_not_stop_a_cancellation(use: str) -> None:
    """The collector comes while a thread cancels a step and the engine's thread waits for that."""

    class Collecting(GatedEngine):
        def cancel(self) -> None:
            self.permit(1)  # the step ends, and its thread comes to the lock of the next
            gc.collect()
            super().cancel()

    gc.disable()
    try:
        engine, calls = Collecting(), []
        llm = LLM.from_engine(engine)
        other, stream = llm.stream([7], FOUR), llm.stream([1], FOUR)
        uses = {
            "close": other.close, "generate": lambda: llm.generate([3], FOUR),
            "run": lambda: llm.run(list), "close the model": llm.close,
        }  # fmt: skip

        def finalize() -> None:
            calls.append(use)
            try:
                uses[use]()
            except RequestError as error:
                calls.append(type(error))

        OnCollection(finalize)
        engine.permit(1)
        next(stream)
        settle_steps(engine, 2)
        stream.close()
        assert calls == [use] + [RequestError] * (use in ("generate", "run"))
        llm.close()
        assert engine.closed
    finally:
        gc.enable()


def test_the_collector_may_come_inside_a_sink(llm: LLM, engine: GatedEngine, callers) -> None:
    gone = llm.stream([1], SamplingParams(max_tokens=40))
    engine.permit(1)
    next(gone)
    OnCollection(gone.close)
    request = llm.intake.request([2, 3], FOUR)
    answers: SimpleQueue = SimpleQueue()
    request.sink = lambda delta: (gc.collect(), answers.put(delta))
    del gone
    llm.loop.submit([request])
    engine.permit(99)
    assert [llm.loop.wait(answers).token_ids[0] for _ in range(4)] == reference_tokens([2, 3], 4)
    settle(llm)
    assert not engine.sequences


def test_a_progress_may_close_the_model(engine: GatedEngine) -> None:
    engine.plan = type(engine.plan)(sequences=1)
    llm = LLM.from_engine(engine)
    engine.permit(1)
    with pytest.raises(RequestError, match="closed"):
        llm.generate([[1], [2]], SamplingParams(max_tokens=1), lambda done, total: llm.close())
    assert engine.closed


def test_a_stream_that_is_dropped_leaves_within_one_step(llm: LLM, engine: GatedEngine) -> None:
    stream = llm.stream([1], SamplingParams(max_tokens=40))
    engine.permit(1)
    next(stream)
    settle_steps(engine, 2)
    del stream
    engine.permit(1)
    settle(llm)
    assert not engine.sequences and not engine.began.qsize()


def test_a_stream_that_another_thread_closes_ends(llm: LLM, engine: GatedEngine, callers) -> None:
    stream = llm.stream([1], FOUR)
    waiter = callers.submit(next, stream)
    engine.rows()
    stream.close()
    with pytest.raises(StepCancelled):
        in_time(waiter)


def test_waiters_get_an_error_when_the_model_is_closed(llm: LLM, engine: GatedEngine, callers) -> None:
    """One is in a step, one waits for a sequence, one scores, one has been handed in just now."""
    engine.plan = type(engine.plan)(sequences=1)
    with LLM.from_engine(engine) as llm:
        running = callers.submit(tokens, llm, [1])
        engine.rows()
        waiting = callers.submit(tokens, llm, [2])
        scoring = callers.submit(llm.logits, [3])
        calling = callers.submit(llm.run, list)
        while llm.loop._worker.commands.qsize() < 3:
            pass
        llm.close()
        for waiter in (running, waiting, scoring):
            with pytest.raises(RequestError, match="closed"):
                in_time(waiter)
        assert in_time(calling) == []  # it was its turn before
    assert engine.closed and not engine.sequences and engine.cancels == 1


def test_closing_from_many_threads_is_closing_once(engine: GatedEngine, callers) -> None:
    llm = LLM.from_engine(engine)
    request = callers.submit(tokens, llm, [1])
    engine.rows()
    for closing in [callers.submit(llm.close) for _ in range(4)]:
        in_time(closing)
        assert engine.closed
    with pytest.raises(RequestError):
        in_time(request)


def test_what_closing_an_engine_raises_reaches_the_one_who_closes() -> None:
    class Stuck(DummyEngine):
        def close(self) -> None:
            raise OSError("cannot be unmapped")

    llm = LLM.from_engine(Stuck())
    with pytest.raises(OSError, match="unmapped"):
        llm.close()
    llm.close()


@pytest.mark.parametrize("error", [KernelError("broken"), DeviceFailed("lost"), StepCancelled("cancelled"), OSError(5)])
def test_a_failed_step_is_the_error_of_its_requests_alone(engine: GatedEngine, callers, error: Exception) -> None:
    """A StepCancelled that no request of this LLM asked for too: somebody called `Engine.cancel`."""
    engine.plan = type(engine.plan)(sequences=1)
    with LLM.from_engine(engine) as llm:
        running = callers.submit(tokens, llm, [1])
        engine.rows()
        waiting = callers.submit(tokens, llm, [2])
        while llm.loop._worker.commands.empty():
            pass
        engine.let_fail(error)
        engine.permit(4)
        with pytest.raises(type(error)):
            in_time(running)
        assert in_time(waiting) == reference_tokens([2], 4)


def test_a_fault_of_the_scheduler_hangs_nobody(llm: LLM, engine: GatedEngine, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(scheduling.Scheduler, "_schedule", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens(llm, [1])
    engine.permit(4)
    assert tokens(llm, [2]) == reference_tokens([2], 4)


def test_a_progress_that_raises_ends_its_own_call(llm: LLM, engine: GatedEngine, callers) -> None:
    def progress(done: int, total: int) -> None:
        called.set()
        raise ValueError(done, total)

    called = threading.Event()
    lengths = iter([SamplingParams(max_tokens=1)])
    mine = callers.submit(llm.generate, [[1], [2]], next(lengths), progress)
    engine.rows()
    other = callers.submit(tokens, llm, [3])
    engine.permit(99)
    with pytest.raises(ValueError, match="2"):
        in_time(mine)
    assert called.is_set() and in_time(other) == reference_tokens([3], 4)
    settle(llm)
    assert not engine.sequences


def test_an_observer_that_raises_is_told_to_the_one_who_observes(engine: GatedEngine) -> None:
    def observe(record: StepRecord) -> None:
        seen.append(threading.current_thread().name)
        raise ValueError("no room")

    seen: list[str] = []
    engine.permit(99)
    llm = LLM.from_engine(engine)
    for end in (lambda: llm.observe(None), llm.close):
        llm.observe(observe)
        assert tokens(llm, [1]) == reference_tokens([1], 4)
        with pytest.raises(ValueError, match="no room"):
            end()
    assert seen == ["hybrid-engine"] * 2 and engine.closed
    llm.close()


def test_an_observer_hides_no_other_error(engine: GatedEngine) -> None:
    engine.permit(99)
    with pytest.raises(KeyError), LLM.from_engine(engine) as llm:
        llm.observe(lambda record: 1 / 0)
        tokens(llm, [1])
        raise KeyError


def test_a_step_has_been_observed_when_its_answer_comes(llm: LLM, engine: GatedEngine) -> None:
    records: list[StepRecord] = []
    llm.observe(records.append)
    engine.permit(99)
    for calls in range(1, 6):
        tokens(llm, [1])
        assert len(records) == 4 * calls


def test_a_callback_cannot_wait_for_its_own_thread(llm: LLM, engine: GatedEngine) -> None:
    def observe(record: StepRecord) -> None:
        llm.run(lambda: seen.append("ran"))
        for call in (lambda: tokens(llm, [1]), lambda: llm.logits([1]), lambda: next(llm.stream([1]))):
            try:
                call()
            except RequestError as error:
                seen.append(str(error))
        llm.observe(None)

    seen: list[str] = []
    llm.observe(observe)
    engine.permit(4)
    assert tokens(llm, [2]) == reference_tokens([2], 4)
    assert seen[0] == "ran" and len(seen) == 4 and all("wait for itself" in line for line in seen[1:])


def test_a_callback_may_close_the_model(engine: GatedEngine) -> None:
    llm = LLM.from_engine(engine)
    llm.observe(lambda record: llm.close())
    engine.permit(1)
    with pytest.raises(RequestError, match="closed"):
        tokens(llm, [1])
    llm.close()
    assert engine.closed


def test_what_is_called_between_steps_gives_its_result_or_its_error(llm: LLM) -> None:
    assert llm.run(threading.get_ident) == llm.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        llm.run(lambda: 1 // 0)
    assert llm.run(lambda: 5) == 5


def test_scores_go_between_steps_and_leave_when_they_are_not_wanted(llm: LLM, engine: GatedEngine, callers) -> None:
    running = callers.submit(tokens, llm, [1])
    engine.rows()
    scoring = callers.submit(llm.logits, list(range(20)))
    while llm.loop._worker.commands.empty():
        pass
    engine.permit(1)
    assert engine.rows() == 8  # its first chunk
    engine.permit(3)
    assert in_time(scoring).shape == (20, 300)
    engine.permit(3)
    assert in_time(running) == reference_tokens([1], 4)
    settle(llm)
    assert not engine.sequences


def test_a_limit_on_threads_is_one_line(engine: GatedEngine, monkeypatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(CapacityError, match="can't start new thread; raise the limit"):
        LLM.from_engine(engine)


def test_tokens_are_those_of_one_thread(callers) -> None:
    """Many threads at once, on an engine that waits for nobody."""
    with LLM.from_engine(DummyEngine()) as llm:
        futures = {n: callers.submit(tokens, llm, [n, 1], SamplingParams(max_tokens=20)) for n in range(40)}
        for n, future in futures.items():
            assert in_time(future) == reference_tokens([n, 1], 20)


def test_a_loop_takes_jobs_that_were_dropped_before() -> None:
    engine = DummyEngine()
    with LLM.from_engine(engine) as llm:
        loop: Loop = llm.loop
        request = llm.intake.request([1], FOUR)
        answers: SimpleQueue = SimpleQueue()
        request.sink = answers.put
        loop.drop([request])
        assert loop.wait(answers).finish_reason == "cancelled"
        assert llm.logits([1, 2]).dtype == np.float32
