"""The engine's thread at its worst moments. Steps of a gated engine wait for the test: nothing is left to chance."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import numpy as np
import pytest
from dummy_engine import WATCHDOG, DummyEngine, GatedEngine, reference_tokens

from hybrid import LLM, SamplingParams
from hybrid.errors import CapacityError, DeviceFailed, HybridError, KernelError, RequestError, StepCancelled
from hybrid.serving import scheduler as scheduling
from hybrid.serving.loop import Loop
from hybrid.serving.scheduler import StepRecord

FOUR = SamplingParams(max_tokens=4)


@pytest.fixture
def engine() -> GatedEngine:
    return GatedEngine()


@pytest.fixture
def llm(engine: GatedEngine):
    """Closing it ends whatever still waits for the gate."""
    with LLM.from_engine(engine) as opened:
        yield opened


@pytest.fixture
def callers():
    """Threads to call the LLM from."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def tokens(llm: LLM, prompt: list[int], params: SamplingParams = FOUR) -> list[int]:
    return llm.generate(prompt, params)[0].token_ids


def settle(llm: LLM) -> None:
    """Until the thread has done what it was asked for."""
    llm.run(lambda: None)


def in_time(future):
    return future.result(WATCHDOG)


def test_requests_join_the_steps_of_those_that_run(llm: LLM, engine: GatedEngine, callers) -> None:
    first = callers.submit(tokens, llm, [1])
    assert engine.rows() == 1
    second = callers.submit(tokens, llm, [2, 3])
    while llm._loop._worker.commands.empty():  # until it has been handed in
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


def settle_steps(engine: GatedEngine, steps: int) -> None:
    for _ in range(steps):
        engine.rows()


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
    while llm._loop._worker.commands.empty():
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


def test_a_stream_that_the_collector_closes_inside_a_step_breaks_nobody(llm: LLM, engine: GatedEngine, monkeypatch):
    class Session:
        pass

    session = Session()
    session.stream, session.itself = llm.stream([1], FOUR), session
    engine.permit(1)
    next(session.stream)
    settle_steps(engine, 2)
    request = weakref.ref(session.stream._request)
    batch = scheduling._batch
    monkeypatch.setattr(scheduling, "_batch", lambda chunks: (gc.collect(), batch(chunks))[1])
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
        while llm._loop._worker.commands.qsize() < 3:
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
        while llm._loop._worker.commands.empty():
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
    while llm._loop._worker.commands.empty():
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


def test_a_model_that_nobody_holds_is_collected_with_its_thread() -> None:
    engine = DummyEngine()
    llm = LLM.from_engine(engine)
    assert tokens(llm, [1]) == reference_tokens([1], 4)
    llm.observe(None)
    llm.run(partial(getattr, llm, "engine"))  # the thread must not keep what it was told last
    thread, gone = llm._loop._worker.thread, [weakref.ref(llm), weakref.ref(engine)]
    gc.disable()
    try:
        del llm, engine
        thread.join(WATCHDOG)
        assert not thread.is_alive() and [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_a_stream_holds_its_model(engine: GatedEngine) -> None:
    stream = LLM.from_engine(engine).stream([1], FOUR)
    engine.permit(4)
    assert [delta.token_ids[0] for delta in stream] == reference_tokens([1], 4)


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def on_main_interrupted(engine: GatedEngine, call: Callable[[], object], when: Callable[[], object]) -> None:
    """A call of this thread, which must be the main one, interrupted as soon as `when` has returned on another."""

    def work() -> None:
        when()
        interrupt()

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        call()
    thread.join(WATCHDOG)


CALLS = [
    lambda llm: llm.generate([[1], [2]], FOUR),
    lambda llm: list(llm.stream([1], FOUR)),
    lambda llm: llm.logits([1, 2, 3]),
]


@pytest.mark.parametrize("call", CALLS, ids=["generate", "stream", "logits"])
def test_ctrl_c_ends_the_step_that_is_the_callers_alone(llm: LLM, engine: GatedEngine, call) -> None:
    on_main_interrupted(engine, lambda: call(llm), engine.rows)
    assert engine.cancels == 1 and not engine.sequences  # known when the call has been left
    engine.permit(4)
    assert tokens(llm, [5]) == reference_tokens([5], 4)


@pytest.mark.parametrize("call", CALLS[:2], ids=["generate", "stream"])
def test_ctrl_c_does_not_wait_for_the_steps_of_others(llm: LLM, engine: GatedEngine, callers, call) -> None:
    other = callers.submit(tokens, llm, [7])
    engine.rows()

    def joint_step() -> None:
        while llm._loop._worker.commands.empty():
            pass
        engine.permit(1)
        engine.rows()

    on_main_interrupted(engine, lambda: call(llm), joint_step)
    assert engine.cancels == 0 and not other.done()  # the step still runs
    engine.permit(99)
    assert engine.rows() == 1  # the next one is the other's alone
    assert in_time(other) == reference_tokens([7], 4)


def forked(call: Callable[[], object]) -> str:
    """What a child says that calls it: the error of ours, or what was returned."""
    read, write = os.pipe()
    if not (child := os.fork()):
        signal.alarm(WATCHDOG)  # nobody hears of a child that hangs otherwise
        try:
            text = repr(call())
        except HybridError as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return text


def test_a_child_that_inherits_a_model_says_so_and_waits_for_nothing(llm: LLM, engine: GatedEngine, callers) -> None:
    stream = llm.stream([1], FOUR)
    engine.permit(1)
    next(stream)
    settle_steps(engine, 2)
    with llm._loop._worker.stepper._lock:  # somebody was about to cancel
        uses = (
            lambda: llm.generate([1]), lambda: llm.generate([]), lambda: next(stream), lambda: llm.stream([1]),
            lambda: llm.logits([1]), lambda: llm.observe(None), lambda: llm.run(list),
        )  # fmt: skip
        for use in uses:
            assert forked(use).startswith("KernelError: this model was opened before a fork")
        assert forked(stream.close) == forked(llm.close) == forked(lambda: llm.__exit__(None, None, None)) == "None"
    engine.permit(99)
    assert len(list(stream)) == 3


def run_script(script: str) -> subprocess.CompletedProcess:
    """In a process of its own, on the embedded model."""
    pytest.importorskip("cpu_kernels", exc_type=ImportError)
    head = "import os, sys, threading\nfrom hybrid import LLM, SamplingParams as S\nllm = LLM(threads=2)\n"
    return subprocess.run(
        [sys.executable, "-c", head + script], capture_output=True, text=True, timeout=WATCHDOG, check=False
    )


DAEMONS = """
began = threading.Barrier(5)
def work():
    next(llm.stream('Once', S(ignore_eos=True)))
    began.wait()
    while True: llm.generate('Once', S(max_tokens=50, ignore_eos=True))
for _ in range(4): threading.Thread(target=work, daemon=True).start()
began.wait()
"""


def test_the_interpreter_ends_in_peace_while_daemon_threads_generate() -> None:
    result = run_script(DAEMONS)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_call_while_the_interpreter_ends_is_refused() -> None:
    script = "import atexit\natexit.register(lambda: llm.generate('x'))\n"
    head = "import hybrid\n"
    late = run_script(head + script)
    assert late.returncode == 0 and late.stderr == ""  # registered later, it is called before the thread ends
    early = subprocess.run(
        [sys.executable, "-c", f"{script}from hybrid import LLM\nllm = LLM()\n"],
        capture_output=True, text=True, timeout=WATCHDOG, check=False,
    )  # fmt: skip
    assert early.stderr.strip().endswith("hybrid.errors.RequestError: this LLM was closed; make a new one")


def test_a_child_of_a_running_model_ends() -> None:
    script = """
stream = llm.stream('Once', S(max_tokens=1900, ignore_eos=True))
next(stream)
child = os.fork()
if not child:
    import signal; signal.alarm(60)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
next(stream); stream.close(); llm.close(); print('fine')
"""
    result = run_script(script)
    assert result.stdout == "fine\n", result.stderr


def test_tokens_are_those_of_one_thread(callers) -> None:
    """Many threads at once, on an engine that waits for nobody."""
    with LLM.from_engine(DummyEngine()) as llm:
        futures = {n: callers.submit(tokens, llm, [n, 1], SamplingParams(max_tokens=20)) for n in range(40)}
        for n, future in futures.items():
            assert in_time(future) == reference_tokens([n, 1], 20)


def test_a_loop_takes_jobs_that_were_dropped_before() -> None:
    engine = DummyEngine()
    with LLM.from_engine(engine) as llm:
        loop: Loop = llm._loop
        request = llm._intake.request([1], FOUR)
        answers: SimpleQueue = SimpleQueue()
        request.sink = answers.put
        loop.drop([request])
        assert loop.wait(answers).finish_reason == "cancelled"
        assert llm.logits([1, 2]).dtype == np.float32
