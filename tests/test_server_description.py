"""What the description of the API says of bodies, held against what the server takes and refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from json_schemas import fits  # noqa: E402
from server_rig import QUESTION, Running, running  # noqa: E402
from test_server_bodies import BODIES  # noqa: E402
from test_server_limits import CHAT, CHATS, COMPLETE, FIELDS, NULLS  # noqa: E402

from hybrid import LLM  # noqa: E402

# What no description can say: ids of this vocabulary, lengths of this context, fields that contradict each other, and
# what this model can do.
BEYOND: list[dict[str, Any]] = [
    {"logit_bias": {"1000000": 1}},
    {"prompt": [2**31 - 1]},
    {"prompt": ["a"] * 1000},
    {"min_tokens": 5},
    {"tool_choice": {"type": "function", "function": {"name": "x"}}},
    *(
        {name: body[name] for name in body if name != "messages"}
        for body in CHATS
        if {"guided_regex", "verbosity", "reasoning", "thinking"} & set(body)
    ),
]
COUNT, RESPONSES, OLLAMA = "/v1/messages/count_tokens", "/v1/responses", "/api/chat"


def called(calls: Any) -> tuple[str, dict[str, Any]]:
    """A chat of Ollama's with calls of tools."""
    said = {"role": "assistant", "content": "a", "tool_calls": calls}
    return OLLAMA, {"model": "tiny", "options": {"num_predict": 1}, "messages": [*QUESTION, said, *QUESTION]}


def holding(*blocks: Any) -> tuple[str, dict[str, Any]]:
    """A message of Anthropic's with blocks."""
    return COUNT, {"messages": [{"role": "user", "content": [*blocks]}]}


def offering(*tools: Any) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {"input": "a", "max_output_tokens": 1, "tools": [*tools]}


TEXT, LIST = {"type": "text", "text": "a"}, {"type": "function", "name": "list"}
FOUND = {"type": "search_result", "title": "a", "source": "b", "content": "c"}
RETURNED = {"type": "tool_result", "tool_use_id": "a"}
SAID = [{"role": "assistant", "content": "a"}]
REFUSED = [
    *((COMPLETE, {"prompt": "a", "max_tokens": 1, name: value}) for name, value in FIELDS),
    *((CHAT, body) for body in CHATS),
    (CHAT, {"messages": QUESTION, "stream": True, "prompt_logprobs": 1}),
    (CHAT, {"messages": [{"role": "user", "content": [{"text": "a"}]}]}),
    (CHAT, {"messages": QUESTION, "tool_choice": "some"}),
    (CHAT, {"messages": QUESTION, "tool_choice": {"type": "allowed_tools"}}),
    (CHAT, {"messages": QUESTION, "tool_choice": {"type": ["function"]}}),
    (
        CHAT,
        {
            "messages": QUESTION,
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [7]}},
        },
    ),
    (CHAT, {"messages": QUESTION, "tool_choice": "required"}),
    (CHAT, {"messages": QUESTION, "tools": [{"type": "custom"}]}),
    (CHAT, {"messages": QUESTION, "chat_template_kwargs": {"thinking": "a" * 101}}),
    ("/v1/messages", {"model": "tiny", "messages": QUESTION}),
    ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": [{"role": "king", "content": "a"}]}),
    ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": [{**QUESTION[0], "name": "a"}]}),
    (COUNT, {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]}),
    (COUNT, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
    (COUNT, {"messages": [{"role": "user", "content": [{"type": "search_result", "title": 7, "source": "a"}]}]}),
    ("/v1/responses", {"input": "a", "previous_response_id": "resp_1"}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}),
    ("/v1/responses", {"input": "a", "tool_choice": "some"}),
    ("/v1/responses", {"input": "a", "tool_choice": "required"}),
    ("/api/chat", {"model": "tiny", "messages": QUESTION, "think": "hard"}),
    ("/api/chat", {"model": "tiny", "messages": QUESTION, "options": {"mirostat": False}}),
    ("/api/chat", {"model": "tiny", "messages": QUESTION, "top_logprobs": 1}),
    ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "a", "color": "red"}]}),
    (COMPLETE, {"prompt": "a", "use_beam_search": 0}),
    (COMPLETE, {"prompt": "a", "skip_special_tokens": 1}),
    (COMPLETE, {"prompt": "a", "guided_choice": []}),
    ("/v1/responses", {"input": "a", "top_logprobs": False}),
    ("/v1/responses", {"input": [{"role": "user", "content": 7}]}),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "a"}]}),
    *(
        called(calls)
        for calls in ({}, "a", [7], [{}], [{"function": 7}], [{"function": {}}], [{"function": {"name": 7}}])
    ),
    called([{"function": {"name": "a", "arguments": "{}"}}]),
    (OLLAMA, {"model": "tiny", "messages": [{"role": "user", "content": 0}]}),
    (OLLAMA, {"model": "tiny", "messages": [{"role": "user", "content": "a", "images": ""}]}),
    *(
        holding({"type": "document", "source": source})
        for source in (
            7,
            {},
            {"type": "base64", "data": "a"},
            {"type": "text"},
            {"type": "content", "content": [FOUND]},
        )
    ),
    holding({"type": "document"}),
    holding({"type": "document", "title": 7, "source": {"type": "text", "data": "a"}}),
    holding({**FOUND, "content": [7]}),
    holding({**FOUND, "content": None}),
    *(holding({**RETURNED, "content": content}) for content in (0, TEXT, [{"type": "image"}], [RETURNED])),
    (COUNT, {"messages": QUESTION, "system": [{"type": "image"}]}),
    *(
        offering(tool)
        for tool in (
            {"type": "web_search"},
            {"type": "tool_search"},
            {"type": "shell", "environment": {"type": "container_auto"}},
            {"type": "computer"},
            {"type": "namespace", "name": "a"},
            {"type": "namespace", "name": "a", "tools": [{"type": "web_search"}]},
            {"type": "function"},
            {"type": "custom", "name": None},
        )
    ),
    ("/api/chat", {"model": "huge", "messages": QUESTION}),
    ("/api/show", {"model": "huge"}),
    ("/tokenize", {}),
    ("/tokenize", {"content": "a", "prompt": "a"}),
    ("/detokenize", {"tokens": [-1]}),
]
TAKEN = [
    *NULLS,
    (CHAT, {"messages": [*QUESTION, *SAID, *QUESTION], "max_tokens": 1, "response_format": {"type": "text"}}),
    (CHAT, {"messages": QUESTION, "max_tokens": 1, "logprobs": True, "top_logprobs": 2, "tool_choice": "auto"}),
    (CHAT, {"messages": QUESTION, "max_tokens": 1.0, "unknown": None, "logit_bias": {"5": 1}}),
    (COMPLETE, {"prompt": ["a", "b"], "max_tokens": 1}),
    (COMPLETE, {"prompt": [[5], [6, 7]], "max_tokens": 1, "stop": ["x"]}),
    (COUNT, {"messages": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]}, *QUESTION]}),
    (COUNT, {"messages": QUESTION, "system": [{"type": "text", "text": "a"}]}),
    called([{"function": {"name": "a", "arguments": {"b": 1}}}, {"id": "c", "function": {"name": "d"}}]),
    called([]),
    called(None),
    (
        OLLAMA,
        {"model": "tiny", "options": {"num_predict": 1}, "messages": [{"role": "user", "images": [], "content": "a"}]},
    ),
    holding(TEXT, FOUND, {**FOUND, "content": [TEXT]}),
    holding({"type": "document", "title": None, "source": {"type": "text", "data": "a", "media_type": "text/plain"}}),
    holding({"type": "document", "title": "b", "source": {"type": "content", "content": [TEXT]}}),
    holding({"type": "document", "source": {"type": "content", "content": "c"}}),
    *(holding({**RETURNED, "content": content}) for content in (None, "a", [], [TEXT, FOUND])),
    (COUNT, {"messages": QUESTION, "system": [FOUND]}),
    offering(),
    offering({"type": "web_search"}, LIST),
    offering({"type": "shell"}, {"type": "apply_patch"}),
    offering({"type": "shell", "environment": {"type": "local"}}),
    offering({"type": "tool_search", "execution": "client"}),
    offering({"type": "namespace", "name": "a", "tools": [{"type": "web_search"}, LIST]}),
    ("/api/show", {"model": "tiny:latest", "verbose": True}),
    ("/api/show", {}),
    ("/tokenize", {"prompt": "a", "content": None}),
    ("/detokenize", {"tokens": [5.0]}),
    ("/apply-template", {"messages": QUESTION}),
]


@pytest.fixture(scope="module")
def server():
    with running(LLM()) as server:
        yield server


@pytest.fixture(scope="module")
def schemas(server: Running) -> dict[str, Any]:
    paths = server.http.get("/openapi.json").json()["paths"]
    posts = {path: methods["post"] for path, methods in paths.items() if "post" in methods}
    return {path: post["requestBody"]["content"]["application/json"]["schema"] for path, post in posts.items()}


@pytest.mark.parametrize(("path", "body"), REFUSED, ids=lambda value: f"{value!r:.90}")
def test_what_is_refused_is_described_as_wrong(server: Running, schemas, path: str, body: dict) -> None:
    assert server.post(path, **body).status_code in (400, 404)
    beyond = any(item.items() <= body.items() for item in BEYOND) or "word word" in str(body)
    assert fits(schemas[path], body) == beyond


@pytest.mark.parametrize(("path", "body"), TAKEN, ids=lambda value: f"{value!r:.90}")
def test_what_is_taken_is_described(server: Running, schemas, path: str, body: dict) -> None:
    assert server.post(path, **body).status_code == 200
    assert fits(schemas[path], body)


@pytest.mark.parametrize(("path", "body"), BODIES, ids=lambda text: text[:24])
def test_what_clients_send_is_described(schemas, path: str, body: str) -> None:
    """Which the server takes, as `test_server_bodies` says."""
    assert fits(schemas[path], json.loads(body))
