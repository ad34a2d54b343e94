"""What the server refuses, and how: the corpus of bad inputs, keys, hosts, origins, a full queue."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from dummy_engine import WATCHDOG, GatedEngine  # noqa: E402
from dummy_tokenizer import BYTES  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from server_rig import QUESTION, Running, running, until  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.errors import ConfigError  # noqa: E402
from hybrid.server import log  # noqa: E402
from hybrid.server.config import ServerConfig  # noqa: E402
from hybrid.server.log import Lines, lines_to  # noqa: E402
from hybrid.server.process import listen  # noqa: E402
from hybrid.server.strict import Strict  # noqa: E402

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def raw(server: Running, data: bytes) -> bytes:
    """The whole reply to bytes that are sent as they are."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        reply = b""
        with suppress(ConnectionResetError):  # the server has not read all of it
            connection.sendall(data)
            while part := connection.recv(1 << 16):
                reply += part
        return reply


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "too large a number": b'{"prompt": "a", "temperature": 1e999}',
    "a number of many digits": b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "no UTF-8": b'{"prompt": "\xff"}',
    "very deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep": b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_body_that_is_none_is_refused(server: Running, body: bytes) -> None:
    response = server.http.post(COMPLETE, content=body)
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


FIELDS = [
    ("n", 10**9),
    ("n", 0),
    ("n", True),
    ("n", "1"),
    ("max_tokens", -2),
    ("max_tokens", 2**31),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_k", -2),
    ("min_p", 2),
    ("seed", 2**64),
    ("max_tokens", 2.5),
    ("prompt", [5.5]),
    ("stop", ["x"] * 10_000),
    ("stop", ["x" * 10_000]),
    ("stop", "x" * 10_000),
    ("stop", [""]),
    ("logit_bias", {"1000000": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 1e9}),
    ("logprobs", 1000),
    ("presence_penalty", 3),
    ("stop_token_ids", [-1]),
    ("stream", "yes"),
    ("prompt", []),
    ("prompt", [-1]),
    ("prompt", [2**31 - 1]),
    ("prompt", [1, "a"]),
    ("prompt", ["a"] * 1000),
    ("prompt", None),
    ("suffix", "x"),
    ("model", "x"),
    ("min_tokens", 5),
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=lambda value: f"{value!r:.20}")
def test_a_field_out_of_its_bounds_is_refused_by_name(server: Running, field: str, value: object) -> None:
    body = {"prompt": "a", "max_tokens": 1, field: value}
    response = server.post(COMPLETE, **body)
    assert response.status_code == (404 if field == "model" else 400), response.text
    error = response.json()["error"]
    assert field in error["message"] + str(error["param"]) or "is not a token id of this model" in error["message"]


CHATS = [
    {"messages": []},
    {"messages": [{"role": "king", "content": "a"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/a.png"}}]}]},
    {"messages": QUESTION, "tools": [{"type": "function"}]},
    {"messages": QUESTION, "tools": [{"type": "function", "function": {"name": "x"}}] * 200},
    {"messages": QUESTION, "tool_choice": {"type": "function", "function": {"name": "x"}}},
    {"messages": QUESTION, "response_format": {"type": "xml"}},
    {"messages": QUESTION, "response_format": {"type": "json_schema"}},
    {"messages": QUESTION, "guided_regex": "a", "guided_choice": ["b"]},
    {"messages": QUESTION, "top_logprobs": 2},
    {"messages": QUESTION, "logprobs": True, "top_logprobs": 21},
    {"messages": QUESTION, "max_completion_tokens": 0},
    {"messages": QUESTION, "verbosity": "low"},
    {"messages": QUESTION, "separate_reasoning": False},
    {"messages": QUESTION, "reasoning_effort": "low", "reasoning": {"effort": "high"}},
    {"messages": QUESTION, "enable_thinking": False, "thinking": {"type": "enabled"}},
    {"messages": QUESTION, "continue_final_message": True},
    {"messages": QUESTION, "dry_multiplier": 0.8},
    {"messages": QUESTION, "web_search_options": {}},
    {"messages": QUESTION, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
    {"messages": QUESTION, "modalities": ["audio"]},
    {"messages": QUESTION, "unheard_of": 1},
    {"messages": [{"role": "user", "content": "word " * 5000}]},
]


@pytest.mark.parametrize("body", CHATS, ids=lambda body: f"{list(body.items())[-1]!r:.40}")
def test_a_chat_that_cannot_be_is_refused_before_it_streams(server: Running, body: dict) -> None:
    for stream in (False, True):
        response = server.post(CHAT, **body, stream=stream)
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
    assert server.idle


@pytest.mark.parametrize("prompt", ["", " ", "\0", "a" * 3000, "<|im_end|>", "\u2028\x1b[31m"])
def test_odd_prompts_are_prompts(server: Running, prompt: str) -> None:
    assert server.post(COMPLETE, prompt=prompt, max_tokens=2).status_code in (200, 400)
    assert server.http.get("/health").status_code == 200


def test_a_prompt_as_long_as_the_context_is_answered_and_a_longer_one_is_not(server: Running) -> None:
    longest = server.service.llm.llm.max_tokens
    reply = server.post(COMPLETE, prompt=[5] * (longest - 1), max_tokens=9).json()
    assert reply["usage"]["completion_tokens"] == 1 and reply["choices"][0]["finish_reason"] == "length"
    error = server.post(COMPLETE, prompt=[5] * (longest + 1), max_tokens=9).json()["error"]
    assert error["code"] == "context_length_exceeded" and str(longest) in error["message"]


def test_fields_without_effect_are_taken(server: Running) -> None:
    words = {"user": "me", "metadata": {"a": "b"}, "store": False, "seed": -5, "frequency_penalty": 0, "stop": None}
    assert server.post(COMPLETE, prompt="a", max_tokens=1, **words).status_code == 200


def test_numbers_are_whole_however_they_are_written(server: Running) -> None:
    whole = {"prompt": [5, 6], "max_tokens": 2, "n": 1, "seed": 7, "top_k": 3, "stop_token_ids": [9], "logprobs": 1}
    floats = {name: [*map(float, value)] if isinstance(value, list) else float(value) for name, value in whole.items()}
    first, second = (server.post(COMPLETE, **body).json() for body in (whole, floats))
    assert first["choices"] == second["choices"]
    said = {"messages": [{"role": "user", "content": "a"}], "model": "tiny", "max_tokens": 2.0}
    assert server.post("/v1/messages", **said).json()["usage"]["output_tokens"] == 2
    assert server.post("/v1/responses", input="a", max_output_tokens=2.0, seed=9e18).status_code == 200
    options = {"num_predict": 2.0, "seed": -9223372036854776000}
    assert server.post("/api/generate", model="tiny", prompt="a", options=options).status_code == 200
    assert server.post("/detokenize", tokens=[5.0]).status_code == 200


def test_the_description_of_the_api_says_what_is_taken(server: Running) -> None:
    """Numbers beyond 2**53 are written there with fewer digits."""
    paths = server.http.get("/openapi.json").json()["paths"]
    body = paths["/v1/responses"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert body["input"]["minItems"] == 1
    for bound in ("minimum", "maximum"):
        seed = int(body["seed"]["anyOf"][0][bound])
        assert server.post(COMPLETE, prompt="a", max_tokens=1, seed=seed).status_code == 200


def test_bodies_are_bounded_and_not_compressed(server: Running) -> None:
    for content in (b" " * (9 << 20), iter([b" " * (1 << 20)] * 9)):
        response = server.http.post(COMPLETE, content=content)
        assert response.status_code == 413 and "--max-body-mb" in response.json()["error"]["message"]
    assert server.http.post(COMPLETE, content=b"x", headers={"content-encoding": "gzip"}).status_code == 415


def test_no_such_endpoint_and_no_such_method(server: Running) -> None:
    assert server.http.get("/v1/nothing").json()["error"]["message"].startswith("there is no such endpoint; ")
    response = server.http.get(COMPLETE)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    huge = raw(server, b"GET /live HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n")
    assert not huge or huge.startswith(b"HTTP/1.1 4")
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {*paths["/metrics"]["get"]["responses"]["200"]["content"]} == {"text/plain"}
    assert {*paths[CHAT]["post"]["responses"]["200"]["content"]} == {"application/json", "text/event-stream"}
    assert "application/x-ndjson" in paths["/api/chat"]["post"]["responses"]["200"]["content"]
    for path, methods in paths.items():
        assert all({"200", "4XX", "5XX"} <= {*method["responses"]} for method in methods.values()), path


def test_names_and_pages_of_other_machines_are_refused(server: Running) -> None:
    assert server.http.get("/info", headers={"host": "evil.example"}).status_code == 403
    assert server.http.get("/info", headers={"origin": "https://evil.example"}).status_code == 403
    local = server.http.get("/info", headers={"origin": "http://localhost:3000"})
    assert local.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "access-control-allow-credentials" not in local.headers
    asked = {"origin": "http://127.0.0.1:1", "access-control-request-method": "POST"}
    assert server.http.options(CHAT, headers=asked).status_code == 204
    assert server.http.options(CHAT, headers={**asked, "origin": "null"}).status_code == 403


def test_ids_of_requests_come_back_if_they_are_harmless(server: Running) -> None:
    assert server.http.get("/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert server.http.get("/live", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_everything_but_liveness_and_the_page_needs_a_key(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nsecond-key\n\n")
    with running(gated().llm, api_key=("first-key",), api_key_file=file) as server:
        open_paths = ["/live", "/ready", "/", "/page/main.js"]
        closed = [
            "/health",
            "/metrics",
            "/info",
            "/v1/models",
            "/openapi.json",
            "/nothing",
            "/page/",
            "//live",
            "/live/",
        ]
        closed += ["/%6cive", "/live%2f..%2finfo", "/ready/../info", "/LIVE", "/live;x"]
        for path in open_paths:
            assert server.http.get(path).status_code == 200
        for path in closed:
            reply = raw(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert reply.startswith(b"HTTP/1.1 401") and b'"invalid_api_key"' in reply, path
        reply = raw(server, b"GET http://x/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 4")
        for path in (CHAT, COMPLETE, "/tokenize", "/detokenize", "/apply-template"):
            assert server.post(path, prompt="a").status_code == 401
        for headers in (
            {"authorization": "Bearer first-key"},
            {"authorization": "bearer second-key"},
            {"x-api-key": "second-key"},
        ):
            assert server.http.get("/info", headers=headers).status_code == 200
        for key in ("", "first-ke", "first-key1", "# of the team", "first-key\xff"):
            head = f"GET /info HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\r\n"
            assert raw(server, head.encode("latin-1")).startswith(b"HTTP/1.1 401")
    with running(gated().llm, api_key=("k",), open_metrics=True) as server:
        assert server.http.get("/metrics").status_code == 200 and server.http.get("/info").status_code == 401


def test_keys_that_are_none_are_refused(tmp_path) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    for words in ({"api_key": ("",)}, {"api_key": ("a b",)}, {"api_key_file": tmp_path / "empty"}):
        with pytest.raises(ConfigError, match="api-key"):
            ServerConfig(**words).all_keys()
    with pytest.raises(ConfigError, match="nothing"):
        ServerConfig(api_key_file=tmp_path / "nothing").all_keys()


def test_an_address_that_is_taken_is_said() -> None:
    with (
        listen(ServerConfig(port=0)) as first,
        pytest.raises(ConfigError, match=r"--port \d+ cannot be listened at \(Address already in use\)"),
    ):
        listen(ServerConfig(port=first.getsockname()[1]))
    with pytest.raises(ConfigError, match="--host"):
        listen(ServerConfig(host="no.such.host.invalid"))


class gated:
    """A model whose steps wait for the test."""

    def __init__(self) -> None:
        self.engine = GatedEngine(sequences=1)
        self.llm = LLM.from_engine(self.engine, BYTES)


def test_a_full_queue_refuses_before_anything_is_looked_at() -> None:
    model = gated()
    with running(model.llm, max_queue=1) as server:
        with server.http.stream("POST", COMPLETE, json={"prompt": "a", "max_tokens": 9, "stream": True}):
            assert server.post(COMPLETE, prompt="a", n=2).json()["error"]["code"] == "queue_full"
            with server.http.stream("POST", COMPLETE, json={"prompt": "a", "max_tokens": 9, "stream": True}):
                full = server.http.post(COMPLETE, content=b"this is not looked at")
                assert (full.status_code, full.headers["retry-after"]) == (503, "1")
                assert server.http.get("/ready").json() == {"status": "ok", "running": 1, "waiting": 1}
                assert "hybrid_requests_refused_total 2.0" in server.http.get("/metrics").text
        until(lambda: server.http.get("/ready").json()["running"] == 0)


def test_a_log_has_no_text_of_the_client_and_no_control_characters(tmp_path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file, lines_to(file.fileno()), running(gated().llm) as server:
        object.__setattr__(server.service.config, "log", "json")
        raw(server, b"GET /a%0a%1b[31mred HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        server.post("/tokenize", content="a secret text")
        until(lambda: log.read_text().count("\n") == 2)  # a line is written once its reply was sent
        object.__setattr__(server.service.config, "log", "text")
        raw(server, b"GET /b%0a%1b[31mred HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    lines = log.read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines[:2]] == [404, 200]
    assert type(json.loads(lines[0])["time"]) is float and re.match(r"time=\d{4}-\d\d-\d\dT[\d:.]{12}[+-]", lines[2])
    assert len(lines) == 3 and "secret" not in "".join(lines) and "\x1b" not in "".join(lines)


@contextmanager
def unread(most: int) -> Iterator[BinaryIO]:
    """The reading end of a pipe that is full to its last byte, to which the log is written."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while os.write(writing, b"-" * 4096):
            pass
    os.set_blocking(writing, True)
    with os.fdopen(reading, "rb") as pipe, lines_to(writing, most):
        yield pipe
    until(lambda: "hybrid-log" not in [thread.name for thread in threading.enumerate()])
    os.close(writing)


def test_a_log_that_nobody_reads_holds_up_nobody_and_says_what_is_lost() -> None:
    with unread(5) as pipe:
        with running(gated().llm) as server:
            object.__setattr__(server.service.config, "log", "text")
            for _ in range(20):
                assert server.post("/tokenize", content="a").status_code == 200
        text = pipe.read1()
        while text.count(b"\n") < 5:
            text += pipe.read1()
        logging.warning("it is read again")  # for which there is room now
        while b"again\n" not in text:
            text += pipe.read1()
    *written, last, again = text.lstrip(b"-").decode().splitlines()
    lost = re.fullmatch(r"(\d+) lines of the log are lost: nobody read it in time", last)
    assert again == "it is read again" and all("path=/tokenize status=200" in line for line in written)
    assert 5 <= len(written) <= 6 and len(written) + int(lost[1]) == 20


def test_a_server_ends_though_nobody_reads_its_log(monkeypatch) -> None:
    monkeypatch.setattr(log, "_CLOSE_SECONDS", 0.01)
    with unread(2):
        for _ in range(9):
            logging.warning("nobody reads this")


def test_whoever_reads_a_log_slowly_is_told_what_is_missing_at_its_end(monkeypatch) -> None:
    monkeypatch.setattr(log, "_CLOSE_SECONDS", 0.01)
    with unread(9) as pipe:
        lines = next(handler for handler in logging.getLogger().handlers if isinstance(handler, Lines))
        for line in ("first", "second", "third"):
            logging.warning(line)
        until(lambda: lines._waiting.qsize() == 2)
        lines.close()
        text = pipe.read1()
        while text.count(b"\n") < 2:
            text += pipe.read1()
    assert text.lstrip(b"-") == b"first\n2 lines of the log are lost: nobody read it in time\n"


class Dropped:
    """Is found by a garbage collection, wherever that comes, and logs then: as a task that nobody awaits."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger, self.itself = logger, self

    def __del__(self) -> None:
        self.logger.error("dropped")


def test_a_log_may_be_written_to_by_a_garbage_collection_that_comes_while_it_is_written_to() -> None:
    logger = logging.Logger("garbage")
    with open(os.devnull, "wb") as nowhere:
        logger.addHandler(lines := Lines(nowhere.fileno()))

        def write() -> None:
            for _ in range(2000):
                Dropped(logger)
                logger.warning("a line")

        thread, before = threading.Thread(target=write, daemon=True), gc.get_threshold()
        gc.set_threshold(20)
        try:
            thread.start()
            thread.join(WATCHDOG)
        finally:
            gc.set_threshold(*before)
        assert not thread.is_alive(), "it waits for itself"
        lines.close()


def test_a_line_that_cannot_be_formatted_is_told_and_fails_nobody(capfd) -> None:
    logger = logging.Logger("wrong")
    logger.addHandler(lines := Lines(2))
    logger.warning("%d tokens", "three")
    logger.warning("%s", Unsaid())
    lines.close()
    first, second = capfd.readouterr().err.splitlines()
    assert "test_server_limits.py" in first and "logs what cannot be written: TypeError" in first
    assert "logs what cannot be written: RecursionError" in second


class Unsaid:
    def __str__(self) -> str:
        raise RecursionError


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": QUESTION, "stream_options": {"x": None}, "tools": [{**TOOL, "strict": None}]}),
        (COMPLETE, {"prompt": "a", "prediction": {"type": "content", "content": "b"}}),
        ("/v1/messages", {"model": "tiny", "messages": QUESTION, "output_config": {"x": None}}),
        ("/v1/responses", {"input": "a", "reasoning": {"x": None}}),
        ("/api/chat", {"model": "tiny", "messages": QUESTION, "options": {"x": None}}),
        ("/tokenize", {"content": "a"}),
    ],
)
def test_what_is_null_asks_for_nothing_and_is_taken_wherever_it_stands(server, path: str, body: dict) -> None:
    body |= {"max_tokens": 2} if path in (CHAT, COMPLETE, "/v1/messages") else {}
    assert server.post(path, **body, functions=None).status_code == 200
    refused = server.post(path, **body, functions=[])
    assert refused.status_code == 400 and "functions" in refused.text


def bodies(kind: type[Strict] = Strict) -> Iterator[type[Strict]]:
    for one in kind.__subclasses__():
        yield one
        yield from bodies(one)


@pytest.mark.parametrize("kind", sorted(set(bodies()), key=lambda kind: kind.__name__))
def test_a_field_that_may_be_left_out_may_be_null(kind: type[Strict]) -> None:
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    try:
        read = kind.model_validate(dict.fromkeys(optional), strict=True)
    except ValidationError as error:
        assert all(one["type"] == "missing" for one in error.errors())
    else:
        assert read == kind()


NULLS = [
    (CHAT, {"messages": QUESTION, "max_tokens": 1, "chat_template_kwargs": {"z": None, "thinking": None}}),
    (CHAT, {"messages": QUESTION, "max_tokens": 1, "stream_options": {"include_usage": None}}),
    (CHAT, {"messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": None, "schema": {}}}),
    ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": [{**QUESTION[0], "name": None}]}),
    ("/v1/responses", {"input": [{**QUESTION[0], "type": None}], "max_output_tokens": 1}),
    ("/api/chat", {"model": "tiny", "messages": None}),
    ("/api/chat", {"model": "tiny", "messages": [{**QUESTION[0], "x": None}], "options": {"num_predict": 1}}),
    ("/api/generate", {"model": "tiny", "prompt": None}),
    ("/tokenize", {"content": "a", "add_special_tokens": None, "with_pieces": None}),
]


@pytest.mark.parametrize(("path", "body"), NULLS)
def test_what_is_null_is_as_if_left_out_in_the_midst_of_a_body_too(server: Running, path: str, body: dict) -> None:
    response = server.post(path, **body)
    assert response.status_code == 200, response.text


def test_no_part_of_an_answer_waits_until_the_client_has_acknowledged_the_one_before() -> None:
    with listen(ServerConfig(port=0)) as listening, socket.create_connection(listening.getsockname()):
        listening.setblocking(True)
        with listening.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
