"""Answers that a client demands of the server in a form: schemas, choices, calls of tools."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")

from pydantic import BaseModel  # noqa: E402
from server_rig import QUESTION, running  # noqa: E402

from hybrid import LLM  # noqa: E402


class Animal(BaseModel):
    kind: str
    legs: int
    tame: bool


def test_openai_parses_what_its_schema_says(client) -> None:
    bound = {"model": "tiny", "messages": QUESTION, "seed": 1, "logit_bias": {"3": 0}, "max_tokens": 400}
    schema = Animal.model_json_schema()
    schema["properties"]["kind"]["maxLength"] = 12
    schema["additionalProperties"] = False
    schema["properties"]["legs"] |= {"minimum": 0, "maximum": 100}
    words = {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": schema}}
    for stream in (False, True):
        reply = client.chat.completions.create(**bound, response_format=words, stream=stream)
        text = "".join(c.choices[0].delta.content or "" for c in reply) if stream else reply.choices[0].message.content
        assert Animal.model_validate_json(text)
    reply = client.chat.completions.create(**bound, response_format={"type": "json_object"}, temperature=0, n=2)
    assert all(choice.message.content.startswith("{") for choice in reply.choices)


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_choice": ["cat", "dog"]},
        {"guided_regex": "cat|dog"},
        {"guided_grammar": 'root ::= "cat" | "dog"'},
        {"structured_outputs": {"choice": ["cat", "dog"]}},
        {"structured_outputs": {"grammar": 'start: "cat" | "dog"', "disable_any_whitespace": None}},
    ],
)
def test_names_of_other_servers(server, fields) -> None:
    chat = server.post("/v1/chat/completions", messages=QUESTION, **fields).json()["choices"][0]
    assert chat["message"]["content"] in ("cat", "dog") and chat["finish_reason"] == "stop"
    plain = server.post("/v1/completions", prompt="A", n=2, **fields).json()["choices"]
    assert all(choice["text"] in ("cat", "dog") for choice in plain)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"guided_json": {"not": {}}}, "not"),
        ({"guided_regex": "("}, "unclosed group"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "one of"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "one of"),
        ({"guided_choice": []}, "choices"),
        ({"tool_choice": "required"}, "no tools"),
    ],
)
def test_what_is_refused_is_one_line_and_no_stream(server, fields, words) -> None:
    for stream in (False, True):
        reply = server.post("/v1/chat/completions", messages=QUESTION, stream=stream, **fields)
        message = reply.json()["error"]["message"]
        assert reply.status_code == 400 and re.search(words, message) and "\n" not in message
    assert json.loads(server.http.get("/ready").text)["status"] == "ok"


def test_calls_that_must_be_made_are_made() -> None:
    function = {"name": "weather", "parameters": Animal.model_json_schema(), "strict": True}
    function["parameters"]["properties"]["kind"] = {"enum": ["cat", "dog"]}
    function["parameters"]["properties"]["legs"] |= {"minimum": 0, "maximum": 9}
    words = {"messages": QUESTION, "tools": [{"type": "function", "function": function}], "seed": 1}
    with running(LLM(tool_parser="hermes")) as server:
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            body = {**words, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 300}
            (reply,) = server.post("/v1/chat/completions", **body).json()["choices"]
            (call,) = reply["message"]["tool_calls"]
            assert reply["finish_reason"] == "tool_calls" and call["function"]["name"] == "weather"
            assert Animal.model_validate_json(call["function"]["arguments"])
            events = server.events("/v1/chat/completions", **body)
            deltas = [event["choices"][0]["delta"] for event in events[:-1] if event["choices"]]
            (told,) = [one for delta in deltas for one in delta.get("tool_calls", ())]
            assert told["function"] == call["function"]
        wrong = server.post("/v1/chat/completions", **{**words, "tool_choice": {"name": "other"}})
        assert wrong.status_code == 400 and "tool_choice" in wrong.json()["error"]["message"]
