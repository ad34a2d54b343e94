"""Faults of the engine, injected: steps that raise, have no memory or never end; engines that do not open again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from dummy_engine import WATCHDOG, DummyEngine  # noqa: E402
from dummy_tokenizer import BYTES  # noqa: E402
from server_rig import Running, running, until  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.core import Batch, StepResult  # noqa: E402
from hybrid.engine.engine import Engine  # noqa: E402
from hybrid.errors import CapacityError, KernelError  # noqa: E402
from hybrid.server import health  # noqa: E402
from hybrid.serving.loop import Loop

COMPLETE = "/v1/completions"


@pytest.fixture(autouse=True)
def quickly(monkeypatch) -> None:
    monkeypatch.setattr(health, "_PROBE_SECONDS", 0.02)
    monkeypatch.setattr(health, "_CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(health, "_LOOKS", 15_000)


def llm_of(fail=lambda batch: None) -> LLM:
    """fail: called before each step."""
    return LLM.from_engine(DummyEngine(fail=fail), BYTES)


def raising(error: BaseException):
    def fail(batch) -> None:
        raise error

    return fail


def ask(server: Running, **body: object) -> int:
    return server.post(COMPLETE, prompt="a", max_tokens=3, **body).status_code


def healthy(server: Running) -> bool:
    return server.http.get("/health").status_code == 200


def reopened(server: Running) -> bool:
    return "hybrid_engine_reopened_total 1.0" in server.http.get("/metrics").text


@pytest.mark.parametrize("error", [KernelError("secret"), MemoryError("secret"), ValueError("secret")])
def test_steps_that_go_on_failing_have_the_engine_opened_anew(error, capfd) -> None:
    first = llm_of(raising(error))
    with running(first, again=iter([llm_of()])) as server:
        assert ask(server) == 500
        until(lambda: healthy(server))
        assert ask(server) == 200 and reopened(server)
        assert first.engine.closed and server.idle
    assert "secret" not in capfd.readouterr().err


def test_one_step_that_fails_leaves_the_engine_as_it_is() -> None:
    faults = iter([MemoryError()])

    def fail(batch) -> None:
        for error in faults:
            raise error

    with running(llm_of(fail)) as server:
        assert ask(server) == 500
        until(lambda: healthy(server))
        assert ask(server) == 200 and not reopened(server)


@pytest.mark.parametrize("body", [{}, {"echo": True, "logprobs": 1}, {"prompt_logprobs": 0}], ids=str)
def test_a_step_that_never_ends_fails_its_requests_and_is_left_behind(monkeypatch, body) -> None:
    stuck, over = threading.Event(), threading.Event()
    first = llm_of(lambda batch: over.wait(WATCHDOG))
    monkeypatch.setattr(Loop, "step_seconds", lambda loop: 1e9 * (loop is first.loop and stuck.is_set()))
    with running(first, again=[llm_of()]) as server:
        answers: list[int] = []
        asking = [threading.Thread(target=lambda: answers.append(ask(server, **body))) for _ in range(3)]
        for thread in asking:
            thread.start()
        until(lambda: server.service.taken == 3)
        stuck.set()
        for thread in asking:
            thread.join(WATCHDOG)
        assert answers == [500, 500, 500]
        until(lambda: healthy(server))
        assert ask(server) == 200 and reopened(server) and server.service.abandoned and server.idle
        assert server.http.get("/live").status_code == 200
        over.set()


def test_an_engine_that_is_left_behind_leaves_its_prefix_folder_to_the_next(monkeypatch, tmp_path) -> None:
    """A real one: its step hangs, and the one that is opened in its place has what it had kept."""
    stuck, hangs, over = threading.Event(), threading.Event(), threading.Event()
    forward = Engine.forward

    def hanging(engine: Engine, batch: Batch) -> StepResult:
        if engine is first.engine and stuck.is_set():
            hangs.set()
            over.wait(WATCHDOG)
        return forward(engine, batch)

    def opened() -> LLM:
        return LLM(prefix_dir=tmp_path, max_seq_len=256)

    def cached() -> int:
        usage = server.post(
            "/v1/chat/completions", messages=[{"role": "user", "content": "tell me a story " * 9}], max_tokens=2
        )
        return usage.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    first = opened()
    monkeypatch.setattr(Engine, "forward", hanging)
    monkeypatch.setattr(Loop, "step_seconds", lambda loop: 1e9 * (loop is first.loop and hangs.is_set()))
    with running(first, again=(opened() for _ in range(1))) as server:
        assert cached() == 0
        first.run(first.loop._worker.scheduler._admission.pool._files.flush)
        stuck.set()
        assert ask(server) == 500
        until(lambda: healthy(server))
        assert server.service.abandoned and reopened(server) and cached() > 0
        over.set()
        until(lambda: not first.loop._worker.thread.is_alive())
        assert cached() > 0


def test_a_step_that_is_slow_but_ends_is_no_reason_to_open_anew(monkeypatch) -> None:
    late, over = threading.Event(), threading.Event()
    monkeypatch.setattr(health, "_PROBE_SECONDS", 1)
    monkeypatch.setattr(Loop, "step_seconds", lambda loop: 1e9 * late.is_set())
    with running(llm_of(lambda batch: over.wait(WATCHDOG))) as server:
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(ask(server)))
        asking.start()
        until(lambda: server.service.taken == 1)
        late.set()
        until(lambda: server.service.health.failing)
        late.clear()
        over.set()
        asking.join(WATCHDOG)
        assert answers == [500]
        until(lambda: healthy(server))
        assert ask(server) == 200 and not reopened(server)


def test_how_long_a_step_takes_is_known() -> None:
    begun, over = threading.Event(), threading.Event()
    llm = llm_of(lambda batch: (begun.set(), over.wait(WATCHDOG)))
    assert llm.loop.step_seconds() == 0
    computing = threading.Thread(target=lambda: llm.generate([[1]]))
    computing.start()
    begun.wait(WATCHDOG)
    first = llm.loop.step_seconds()
    assert 0 < first < llm.loop.step_seconds()
    over.set()
    computing.join(WATCHDOG)
    assert llm.loop.step_seconds() == 0
    llm.close()


def test_it_is_not_opened_a_third_time_while_nothing_succeeds() -> None:
    opened: list[LLM] = []

    def again() -> Iterator[LLM]:
        while True:
            opened.append(llm_of(raising(KernelError("broken"))))
            yield opened[-1]

    with running(llm_of(raising(KernelError("broken"))), again=again()) as server:
        assert ask(server) == 500
        until(lambda: opened and server.service._llm)
        for _ in range(5):
            assert ask(server) in (500, 503)
        assert len(opened) == 1 and not healthy(server) and server.http.get("/live").status_code == 200


def test_an_engine_that_does_not_open_again_ends_the_process_with_its_error() -> None:
    def again() -> Iterator[LLM]:
        yield from ()
        raise CapacityError("no memory is left")

    server = Running(llm_of(raising(KernelError("broken"))), again=again())
    assert ask(server) == 500
    assert server.ended() and isinstance(server.process.error, CapacityError)
    server.close()


def test_draining_does_not_wait_for_a_step_that_never_ends() -> None:
    over = threading.Event()
    server = Running(llm_of(lambda batch: over.wait(WATCHDOG)), drain_seconds=0.1)
    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(ask(server)))
    asking.start()
    until(lambda: server.service.taken == 1)
    server.process.end()
    asking.join(WATCHDOG)
    assert answers == [503] and server.ended()
    server.close()
    assert server.service.abandoned
    over.set()
