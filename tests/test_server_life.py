"""A server's life: loading, clients that leave, steps that fail, draining, its end."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from dummy_engine import WATCHDOG, GatedEngine  # noqa: E402
from dummy_tokenizer import BYTES  # noqa: E402
from server_rig import QUESTION, Running, parse_events, running, until  # noqa: E402

import hybrid  # noqa: E402
from hybrid import LLM  # noqa: E402
from hybrid.server import health as health_module  # noqa: E402

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def gated(**plan) -> tuple[GatedEngine, LLM]:
    engine = GatedEngine(**plan)
    return engine, LLM.from_engine(engine, BYTES)


def test_it_lives_at_once_and_is_ready_when_it_is_loaded() -> None:
    with running(None) as server:
        assert server.http.get("/live").status_code == 200
        until(lambda: "progress" in server.http.get("/ready").json())
        ready = server.http.get("/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
        assert ready.json()["progress"] == {"what": "packing", "done": 3, "total": 10}
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
        for reply in (server.post(COMPLETE, prompt="a"), server.http.get("/info"), server.post("/tokenize")):
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "loading"


def test_a_client_that_leaves_ends_its_step_and_frees_its_sequence() -> None:
    engine, llm = gated(sequences=1)
    with running(llm) as server:
        for stream in (True, False):
            body = b'{"prompt": "abc", "max_tokens": 50, "stream": %s}' % (b"true" if stream else b"false")
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head + body)
                engine.rows()  # its step waits, and would for ever
            until(lambda: server.service.taken == 0)
            assert server.idle and not engine.sequences


def test_a_client_that_reads_nothing_is_cut_off_and_stops_nobody() -> None:
    with running(LLM(), send_seconds=0.3) as server:
        body = b'{"prompt": "Once", "max_tokens": 2000, "n": 8, "ignore_eos": true, "logprobs": 20, "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(head + body)
            until(lambda: server.service.taken == 8)
            assert server.post(COMPLETE, prompt="Once", max_tokens=2).status_code == 200
            until(lambda: server.service.taken == 0)
        assert server.idle


def test_a_stream_that_is_silent_sends_comments() -> None:
    engine, llm = gated()
    with running(llm, ping_seconds=0.05) as server:
        body = {"prompt": "a", "max_tokens": 1, "stream": True}
        with server.http.stream("POST", COMPLETE, json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            engine.permit()
            assert list(parse_events(lines))[-1] == "[DONE]"


def test_a_step_that_fails_ends_its_requests_and_is_told_until_steps_succeed(monkeypatch, capfd) -> None:
    monkeypatch.setattr(health_module, "_PROBE_SECONDS", 0.05)
    engine, llm = gated()
    with running(llm) as server:
        for stream in (False, True):
            engine.let_fail(ValueError("a secret of the engine"))
            response = server.post(COMPLETE, prompt="a", max_tokens=3, stream=stream)
            assert response.status_code == (200 if stream else 500)
            assert "secret" not in response.text and "internal_error" in response.text
            assert "[DONE]" not in response.text
            assert server.http.get("/health").status_code == 503
            until(lambda: not engine.began.empty())  # the probe's step waits
            while not engine.began.empty():
                engine.began.get()
            engine.permit()
            until(lambda: server.http.get("/health").status_code == 200)
        engine.permit(3)
        assert server.post(COMPLETE, prompt="a", max_tokens=3).status_code == 200
    assert "secret" not in capfd.readouterr().err


def in_thread(call) -> tuple[threading.Thread, list]:
    results: list = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def test_draining_finishes_what_runs_and_takes_nothing_more() -> None:
    engine, llm = gated()
    server = Running(llm)
    thread, results = in_thread(lambda: server.post(COMPLETE, prompt="a", max_tokens=2))
    engine.rows()
    server.process.end()
    until(lambda: server.http.get("/ready").status_code == 503)
    late = server.post(COMPLETE, prompt="a")
    assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
    engine.permit(2)
    thread.join(WATCHDOG)
    assert results[0].status_code == 200 and results[0].json()["usage"]["completion_tokens"] == 2
    assert server.ended()
    server.close()


def test_draining_ends_what_takes_too_long_by_an_error() -> None:
    engine, llm = gated()
    server = Running(llm, drain_seconds=0.1)
    stream, events = in_thread(lambda: server.events(COMPLETE, prompt="a", max_tokens=50))
    whole, replies = in_thread(lambda: server.post(COMPLETE, prompt="a", max_tokens=50))
    engine.rows()
    until(lambda: server.service.taken == 2)
    server.process.end()
    stream.join(WATCHDOG)
    whole.join(WATCHDOG)
    assert events[0][-1]["error"]["code"] == "shutting_down" and replies[0].status_code == 503
    assert server.ended()
    server.close()


def serve(*flags: str, limit: tuple[str, int] | None = None) -> tuple[subprocess.Popen, str]:
    """A process, and its address once it is ready."""
    command = [sys.executable, "-m", "hybrid.serve", "--port", "0", "--log", "none", *flags]
    if limit is not None:  # of the resources of a process
        code = f"import resource, os, sys; resource.setrlimit(resource.RLIMIT_{limit[0]}, ({limit[1]},) * 2)"
        command = [sys.executable, "-c", f"{code}; os.execv(sys.executable, sys.argv[1:])", *command]
    process = Ended(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("ready at "):
            return process, line.split()[2].rstrip(";")
    raise AssertionError("it ended")


class Ended(subprocess.Popen):
    """A process that ends with its block, which would wait for it forever where something in it has failed."""

    def __exit__(self, *raised: object) -> None:
        self.kill()
        super().__exit__(*raised)


def test_the_line_to_try_it_is_one_for_a_shell_whatever_the_name() -> None:
    name = """a 'quoted' "name" $HOME"""
    process, address = serve("--served-model-name", name)
    line = next(line for line in process.stderr if "curl" in line)
    command, url, *given = shlex.split(line)
    body = json.loads(given[given.index("-d") + 1])
    assert (command, url, body["model"]) == ("curl", f"{address}/v1/chat/completions", name)
    process.send_signal(signal.SIGTERM)
    assert process.wait(WATCHDOG) == 0


def test_the_second_signal_loses_no_line_that_somebody_reads() -> None:
    code = """
from types import SimpleNamespace
from hybrid.server import log
from hybrid.server.process import Process
log._CLOSE_SECONDS = 600
with log.lines_to(2):
    process = Process(None, SimpleNamespace(watch=lambda *given: None), print)
    process.handle_exit(2, None)
    for number in range(900):  # more than a pipe holds
        log.tell(f"{number} " + 200 * "x")
    process.handle_exit(2, None)
"""
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=WATCHDOG)
    assert ended.returncode == 130
    assert [int(line.split()[0]) for line in ended.stderr.splitlines()] == list(range(900))


def test_a_closed_stderr_is_not_taken_for_the_file_that_has_its_number_now(tmp_path) -> None:
    code = """
import logging, os, sys
from hybrid.commands import serve
from hybrid.server.log import tell
other = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
assert other == 2
def answer(*given):
    tell("a line")
    logging.warning("another")
serve._serve_alone = answer
serve.app([], standalone_mode=False)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    ended = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], capture_output=True, timeout=WATCHDOG)
    assert (ended.returncode, ended.stdout) == (0, b"") and (tmp_path / "other").read_bytes() == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_by_a_signal_and_at_once_by_the_second(number: int) -> None:
    process, address = serve("--drain-seconds", "3600")
    assert httpx.get(f"{address}/ready").status_code == 200
    if number == signal.SIGTERM:
        process.send_signal(number)
        assert process.wait(WATCHDOG) == 0 and "the server has ended" in process.stderr.read()
        return
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 8, "logprobs": 20}
    with httpx.stream("POST", f"{address}{COMPLETE}", json=body) as response:
        lines = response.iter_lines()  # which closes the response when nobody has it
        next(lines)
        process.send_signal(number)
        until(lambda: httpx.get(f"{address}/ready").status_code == 503)
        process.send_signal(number)
        assert process.wait(WATCHDOG) == 130
    told = "waiting up to 3600 s for 8 completions to end; a second signal ends them at once"
    assert told in process.stderr.read()


def test_a_server_that_was_killed_has_what_it_kept_and_serves_on_where_no_file_can_be_written(tmp_path) -> None:
    """The first has written the prompts of answers that were given; the second can write nothing."""
    flags = ("--prefix-dir", str(tmp_path), "--max-batch", "1", "--threads", "1")
    prompts = [" ".join([word] * 300) for word in ("fox", "tree", "house")]
    process, address = serve(*flags)
    with process, httpx.Client(base_url=address, timeout=WATCHDOG) as client:
        answers = [ask_once(client, prompt) for prompt in prompts[:2]]
        until(lambda: len(list(tmp_path.rglob("*.prefix"))) >= 2)  # all of the first prompt
        with client.stream("POST", COMPLETE, json={**body_of(prompts[2]), "max_tokens": 900, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
    process, address = serve(*flags, limit=("FSIZE", 4096))
    with process, httpx.Client(base_url=address, timeout=WATCHDOG) as client:
        again = [ask_once(client, prompt) for prompt in (*prompts, *prompts)]
        process.terminate()
        assert process.wait(WATCHDOG) == 0
        said = process.stderr.read()
    assert [text for text, _ in again[:2]] == [text for text, _ in answers]
    assert again[0][1] > 256
    assert [text for text, _ in again[3:]] == [text for text, _ in again[:3]]
    assert said.count("kept prompts are not written") == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_more_connections_than_descriptors_cost_nobody_else_his_answer() -> None:
    process, address = serve("--threads", "1", limit=("NOFILE", 200))
    host, port = address.removeprefix("http://").split(":")
    with process, ExitStack() as opened, httpx.Client(base_url=address, timeout=WATCHDOG) as client:
        assert ask_once(client, "fox")[0]
        for number in range(300):
            opened.enter_context(socket.create_connection((host, int(port)), WATCHDOG))
            if number % 20 == 19:  # often, since a connection is closed that says nothing for five seconds
                assert ask_once(client, "fox")[0]
        refused = opened.enter_context(socket.create_connection((host, int(port)), WATCHDOG))
        assert refused.recv(1000).startswith(b"HTTP/1.1 503")
        opened.close()
        until(lambda: chats(address) == 200)
        process.terminate()
        assert process.wait(WATCHDOG) == 0 and "Traceback" not in process.stderr.read()


def chats(address: str) -> int:
    """By a connection of its own."""
    return httpx.post(f"{address}{CHAT}", json={"messages": QUESTION, "max_tokens": 2}, timeout=WATCHDOG).status_code


def body_of(prompt: str) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def ask_once(client: httpx.Client, prompt: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were computed before."""
    reply = client.post(COMPLETE, json=body_of(prompt)).json()
    return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_what_is_wrong_is_one_line() -> None:
    for flags, said in (
        (["--port", "70000"], "--port 70000"),
        (["--model-path", "/no/such/model"], "/no/such/model"),
    ):
        command = [sys.executable, "-m", "hybrid.cli", "serve", "--port", "0", *flags]
        result = subprocess.run(command, capture_output=True, text=True, timeout=WATCHDOG)
        last = result.stderr.splitlines()[-1]
        assert result.returncode == 2 and last.startswith("error: ") and said in last


def test_a_clock_that_is_set_changes_no_duration(monkeypatch) -> None:
    """The time of the day is told to clients and logs, and compared with that of files; nothing else reads it."""
    told = {"server/service.py", "server/responses.py", "server/exchange.py", "server/replies.py", "server/ollama.py"}
    told |= {"commands/store.py", "commands/bench.py", "text/template_process.py"}
    package = Path(hybrid.__file__).parent
    clock = re.compile(r"(?<![\w.])time\(\)|\btime\.time\(|\bdatetime\.now\(|\butcnow\(|CLOCK_REALTIME")
    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if clock.search(path.read_text())}
    assert found <= told, sorted(found - told)
    days = iter([2e9, 1e9, *[1e9] * 9])
    monkeypatch.setattr("hybrid.server.responses.time", lambda: next(days))
    with running(LLM()) as server:
        reply = server.post("/v1/responses", input="Hi", temperature=0).json()
    assert reply["status"] == "completed" and reply["created_at"] == reply["completed_at"] == 2_000_000_000
