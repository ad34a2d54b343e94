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
from loop_rig import FOUR, callers_fixture, engine_fixture, in_time, llm_fixture, settle, settle_steps, tokens  # noqa: F401

from hybrid import LLM
from hybrid.errors import HybridError


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
