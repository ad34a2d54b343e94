"""How the engine's thread ends, and what does not: models that nobody holds, Ctrl-C, forks, interpreters that end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
from dummy_engine import WATCHDOG, DummyEngine, GatedEngine, reference_tokens
from loop_rig import FOUR, callers_fixture, engine_fixture, in_time, llm_fixture, run_script, settle_steps, tokens  # noqa: F401

from hybrid import LLM
from hybrid.errors import HybridError
from hybrid.serving import loop as loops


def test_a_model_that_nobody_holds_is_collected_with_its_thread() -> None:
    engine = DummyEngine()
    llm = LLM.from_engine(engine)
    assert tokens(llm, [1]) == reference_tokens([1], 4)
    llm.observe(None)
    llm.run(partial(getattr, llm, "engine"))  # the thread must not keep what it was told last
    thread, gone = llm.loop._worker.thread, [weakref.ref(llm), weakref.ref(engine)]
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
        while llm.loop._worker.commands.empty():
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
    with llm.loop._worker.stepper._lock:  # somebody was about to cancel
        uses = (
            lambda: llm.generate([1]), lambda: llm.generate([]), lambda: next(stream), lambda: llm.stream([1]),
            lambda: llm.logits([1]), lambda: llm.observe(None), lambda: llm.run(list),
        )  # fmt: skip
        for use in uses:
            assert forked(use).startswith("KernelError: this model was opened before a fork")
        assert forked(stream.close) == forked(llm.close) == forked(lambda: llm.__exit__(None, None, None)) == "None"
    engine.permit(99)
    assert len(list(stream)) == 3


DAEMONS = """
began = threading.Barrier(5)
def work():
    next(llm.stream('Once', S(ignore_eos=True)))
    began.wait()
    while True: llm.generate('Once', S(max_tokens=50, ignore_eos=True))
for _ in range(4): threading.Thread(target=work, daemon=True).start()
began.wait()
"""


def test_ctrl_c_does_not_keep_the_end_from_waiting_for_the_thread(engine: GatedEngine, monkeypatch) -> None:
    """Both times when the interpreter ends: while the step is cut, and while its thread is joined."""

    def first_interrupted(call: Callable[[], None]) -> Callable[[], None]:
        interrupts = iter([KeyboardInterrupt])

        def called() -> None:
            for error in interrupts:
                raise error
            call()

        return called

    llm = LLM.from_engine(engine)
    worker = llm.loop._worker
    threading.Thread(target=tokens, args=(llm, [1]), daemon=True).start()  # it never gets an answer
    engine.rows()
    monkeypatch.setattr(loops, "_running", {worker})
    monkeypatch.setattr(worker.stepper, "stop", first_interrupted(worker.stepper.stop))
    monkeypatch.setattr(worker.thread, "join", first_interrupted(worker.thread.join))
    loops._end_all()
    assert engine.closed and not worker.thread.is_alive()


AWAITED = """
import asyncio
from hybrid import AsyncLLM
began = threading.Event()
async def work():
    async for delta in AsyncLLM(llm).stream('Once', S(max_tokens=1900, ignore_eos=True)): began.set()
left, closed = asyncio.new_event_loop(), asyncio.new_event_loop()
threading.Thread(target=left.run_until_complete, args=(work(),), daemon=True).start()
task = closed.create_task(work())
while not began.is_set(): closed.run_until_complete(asyncio.sleep(0))
closed.close()
print('fine')
"""


def test_the_interpreter_ends_in_peace_inside_a_step_that_is_awaited() -> None:
    """By the event loop of a daemon thread, and by one that was closed with a task in it."""
    result = run_script(AWAITED)
    assert (result.returncode, result.stdout) == (0, "fine\n") and "Fatal" not in result.stderr, result.stderr


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
