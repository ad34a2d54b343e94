"""What clients send who mean no good, or know no better: HTTP that is odd, and the kinds of holes that others had."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from dummy_engine import WATCHDOG, GatedEngine  # noqa: E402
from dummy_tokenizer import BYTES  # noqa: E402
from mixed import request  # noqa: E402
from scripted_model import Model  # noqa: E402
from server_rig import Running, running, until  # noqa: E402
from test_server_limits import raw  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.server import bodies, connections  # noqa: E402
from hybrid.server.admission import Admission  # noqa: E402
from hybrid.server.service import Service  # noqa: E402
from hybrid.text import rendering  # noqa: E402
from hybrid.text.chat_template import ChatTemplate  # noqa: E402

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = [{"role": "user", "content": "Rain?"}]
BODY = {"prompt": "a", "max_tokens": 1}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server():
    with running(LLM(max_batch=4, threads=1)) as server:
        yield server


def test_requests_one_behind_the_other_are_answered_in_their_order(server: Running) -> None:
    several = [{**BODY, "max_tokens": 1 + number, "ignore_eos": True} for number in range(3)]
    sent = [request(COMPLETE, body, last=body is several[-1]) for body in several]
    reply = raw(server, b"".join(sent))
    assert reply.count(b"HTTP/1.1 200") == 3
    places = [reply.find(b'"completion_tokens":%d' % (1 + number)) for number in range(3)]
    assert 0 < places[0] < places[1] < places[2]


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n{}  ",
        HEAD + b"Content-Length: -1\r\n\r\n{}",
        HEAD + b"Content-Length: 1e3\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/9.9\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET  /live HTTP/1.1\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
    ],
    ids=["two lengths", "negative", "exponent", "no size", "negative size", "version", "TLS", "two spaces", "zeros"],
)
def test_what_is_no_http_ends_its_connection_alone(server: Running, data: bytes) -> None:
    reply = raw(server, data)
    assert not reply or reply.startswith(b"HTTP/1.1 4")
    assert server.post(COMPLETE, **BODY).status_code == 200


def test_a_length_beside_chunks_hides_no_second_request(server: Running) -> None:
    hidden = b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert raw(server, head + b"0\r\n\r\n" + hidden).count(b"HTTP/1.1") <= 1


def test_a_body_that_does_not_arrive_is_given_up(server: Running, monkeypatch) -> None:
    monkeypatch.setattr(bodies, "_BODY_SECONDS", 0.05)
    reply = raw(server, HEAD + b"Connection: close\r\nContent-Length: 100\r\n\r\n{")
    assert reply.startswith(b"HTTP/1.1 408") and b"did not arrive" in reply


def test_connections_beyond_the_limit_are_refused_and_the_others_served(monkeypatch) -> None:
    monkeypatch.setattr(connections, "bounds", lambda: (4, 64))
    with running(Model("abc").llm) as server, ExitStack() as opened:
        address = ("127.0.0.1", server.port)
        for _ in range(3):  # besides that of the client
            opened.enter_context(socket.create_connection(address))
        until(lambda: len(server.process.server_state.connections) == 4)
        with socket.create_connection(address) as refused:
            assert refused.recv(1000).startswith(b"HTTP/1.1 503") and refused.recv(1000) == b""
        assert server.post(CHAT, messages=ASKED).status_code == 200
        opened.close()
        until(lambda: len(server.process.server_state.connections) == 1)
        assert raw(server, request(CHAT, {"messages": ASKED})).startswith(b"HTTP/1.1 200")


def test_a_connection_on_which_no_request_comes_is_closed_however_slowly_it_speaks(monkeypatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    engine = GatedEngine()
    with running(LLM.from_engine(engine, BYTES)) as server:
        address, body = ("127.0.0.1", server.port), request(COMPLETE, {**BODY, "stream": True})
        with ExitStack() as opened:
            silent, slow, asking = (opened.enter_context(socket.create_connection(address)) for _ in range(3))
            asking.sendall(body)
            engine.rows()  # its step waits, and with it the request, for longer than that
            slow.sendall(body[:30])
            for closed in (silent, slow):
                assert closed.recv(100) == b""
            engine.permit()
            assert b"[DONE]" in asking.makefile("rb").read()


def test_a_connection_is_not_closed_right_after_an_answer_that_took_long() -> None:
    """Only once nothing has come for a whole period after it."""
    looks, closed = list[bool](), list[bool]()
    connection = connections.Connection.__new__(connections.Connection)
    connection._seen = None
    connection.cycle = SimpleNamespace(response_complete=False)
    connection._look_later = lambda: looks.append(True)
    connection.transport = SimpleNamespace(close=lambda: closed.append(True))
    connection._look_at()  # it runs
    connection.cycle.response_complete = True
    connection._look_at()  # just answered
    assert len(looks) == 2 and not closed
    connection._look_at()
    assert closed


def test_nothing_becomes_a_web_socket(server: Running) -> None:
    head = b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "get", "PROPFIND"])
def test_other_methods_need_the_key_too(method: str) -> None:
    with running(Model("a").llm, api_key=("k",)) as server:
        for path in ("/info", COMPLETE, "/"):
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            reply = raw(server, head.encode())
            assert reply.startswith(b"HTTP/1.1 4") or path == "/" and method in ("HEAD", "GET"), (path, reply)
            assert b'"isa"' not in reply


def test_a_prompt_of_a_million_characters_is_refused_by_its_length(server: Running) -> None:
    error = server.post(COMPLETE, prompt="a" * 1_000_000, max_tokens=1).json()["error"]
    assert error["code"] == "context_length_exceeded"


TREE = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}, "right": {"$ref": "#/$defs/tree"}}}
FORMS = {
    "nested repetition": {"guided_regex": "(a+)+$"},
    "repetition of repetition": {"guided_regex": "((a{0,100}){0,100}){0,100}"},
    "recursive schema": {"guided_json": {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}}},
    "schema that is itself": {"guided_json": {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}},
    "many choices": {"guided_choice": [f"{number}" for number in range(20_000)]},
    "a grammar that never says anything": {"guided_grammar": "start: start"},
    "a long name": {"guided_json": {"type": "object", "required": ["x" * 100_000]}},
}


@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS.keys())
def test_forms_that_are_costly_are_answered_or_refused(server: Running, fields: dict) -> None:
    pytest.importorskip("llguidance")
    response = server.post(COMPLETE, prompt="a", max_tokens=3, **fields)
    assert response.status_code in (200, 400), response.text
    assert server.post(COMPLETE, **BODY).status_code == 200


def test_a_template_that_never_ends_fails_its_request_and_stops_nobody(monkeypatch) -> None:
    limits = rendering.Limits(seconds=1)
    monkeypatch.setattr(rendering, "Limits", lambda: limits)
    source = "{% if 'loop' in messages[-1].content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    source += "{% endfor %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}."
    with running(Model("abc", template=ChatTemplate(source)).llm) as server:
        answers: list[int] = []
        said = [{"role": "user", "content": "loop"}]
        thread = threading.Thread(target=lambda: answers.append(server.post(CHAT, messages=said).status_code))
        thread.start()
        until(lambda: server.service.taken == 1)
        assert server.post(COMPLETE, prompt="a.", max_tokens=2).status_code == 200 and not answers
        thread.join(WATCHDOG)
        assert answers == [400] and server.post(CHAT, messages=ASKED).status_code == 200


POSTS = {
    CHAT: {"messages": ASKED},
    COMPLETE: BODY,
    "/v1/messages": {"model": "tiny", "messages": ASKED, "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": ASKED},
    "/v1/responses": {"input": "a"},
    "/v1/responses/input_tokens": {"input": "a"},
    "/api/chat": {"model": "tiny", "messages": ASKED},
    "/api/generate": {"model": "tiny", "prompt": "a"},
    "/api/show": {"model": "tiny"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": ASKED},
}
GETS = ("/v1/models", "/v1/models/tiny", "/api/tags", "/api/ps", "/info", "/metrics", "/cache", "/activity", "/ready")


def test_no_answer_has_the_text_of_an_exception(monkeypatch, capfd) -> None:
    """Of any endpoint: each looks at the name of the model, at the engine or at the queue."""

    def fail(*arguments: object) -> None:
        raise ValueError("secret")

    with running(Model("abc").llm) as server:
        paths = set(server.http.get("/openapi.json").json()["paths"])
        with monkeypatch.context() as patched:
            patched.setattr(Service, "check_model", fail)
            patched.setattr(Admission, "running", fail)
            for name in ("names", "llm"):
                patched.setattr(Service, name, property(fail), raising=False)
            replies = [server.post(path, **body) for path, body in POSTS.items()]
            replies += [server.http.get(path) for path in GETS if path != "/metrics"]
        assert {reply.status_code for reply in replies} == {500}
        assert all("secret" not in reply.text and "request id" in reply.text for reply in replies)
        named = {*POSTS, *GETS, "/live", "/health", "/api/version", "/v1/models/{name}", "/v1/responses/{name}"}
        assert paths <= named  # an endpoint that is new is tried here too
    assert "secret" not in capfd.readouterr().err


UNCHECKED = """
import json, sys
sys.path[:0] = sys.argv[1:]
assert False, "asserts are not run"
from server_rig import running
from test_server_limits import BODIES, CHATS, CHAT, COMPLETE, FIELDS
from hybrid import LLM
with running(LLM(max_batch=4, threads=1)) as server:
    codes = [server.http.post(COMPLETE, content=body).status_code for body in BODIES.values()]
    fields = [{"prompt": "a", "max_tokens": 1, field: value} for field, value in FIELDS]
    asked = [(COMPLETE, body) for body in fields] + [(CHAT, body) for body in CHATS]
    codes += [server.post(path, **body).status_code for path, body in asked]
    print(json.dumps(sorted(set(codes))))
"""


def test_nothing_is_checked_by_an_assert() -> None:
    """What is refused is refused without them too: python -O runs none."""
    here = Path(__file__).parent
    command = [sys.executable, "-O", "-c", UNCHECKED, str(here), str(here.parent / "bench")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=4 * WATCHDOG, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [400, 404]
