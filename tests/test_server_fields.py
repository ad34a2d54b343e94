"""What clients of other servers ask for in their own words is done where it can be, in the prompt or in the reply."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from scripted_model import Model  # noqa: E402
from server_rig import Running, parse_events, running  # noqa: E402

from hybrid.serving.answers import Answers  # noqa: E402
from hybrid.text.chat_template import ChatTemplate  # noqa: E402

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
ASKED = [{"role": "user", "content": "Rain?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
THOUGHT = "Hm, hm, hm, hm, hm"
SOURCE = (
    "{{ tools|tojson if tools }}{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% endfor %}"
    "{{ enable_thinking }}/{{ reasoning_effort }}/{{ thinking_budget }}/{{ verbosity }}.{# <think> <tool_call> #}"
)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(f"<think>{THOUGHT}</think>I look", template=ChatTemplate(SOURCE), max_seq_len=900)


@pytest.fixture(scope="module")
def server(model: Model):
    with running(model.llm) as server:
        yield server


WISHES: list[tuple[dict[str, Any], str]] = [
    ({}, "///"),
    ({"enable_thinking": False}, "False///"),
    ({"enable_thinking": True, "thinking_budget": 512}, "True//512/"),
    ({"thinking": {"type": "disabled"}}, "False///"),
    ({"thinking": {"type": "adaptive"}}, "///"),
    ({"thinking": True, "enable_thinking": True}, "True///"),
    ({"reasoning": {"effort": "high", "max_tokens": 99, "enabled": True}}, "True/high/99/"),
    ({"reasoning_effort": "low", "reasoning": {"effort": "low"}}, "/low//"),
    ({"verbosity": "low"}, "///low"),
    ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, "False///"),
]


@pytest.mark.parametrize(("fields", "said"), WISHES, ids=lambda value: f"{value!r:.60}")
def test_wishes_about_thinking_reach_the_template(server: Running, fields: dict, said: str) -> None:
    reply = server.post("/apply-template", messages=ASKED, **fields)
    assert reply.status_code == 200 and reply.json()["prompt"] == f"(u)Rain?{said}."


def test_a_verbosity_that_the_template_does_not_know_is_refused_but_the_usual_one() -> None:
    with running(Model("Well").llm) as server:
        for wish, status in (("medium", 200), ("low", 400), ("high", 400)):
            replies = [
                server.post(CHAT, messages=ASKED, max_tokens=1, verbosity=wish),
                server.post("/v1/responses", input="a", max_output_tokens=1, text={"verbosity": wish}),
                server.post("/apply-template", messages=ASKED, verbosity=wish),
            ]
            assert [reply.status_code for reply in replies] == [status] * 3
            assert status == 200 or all("leave it out" in reply.text for reply in replies)


@pytest.mark.parametrize(
    "fields", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}, {"reasoning_format": "hidden"}]
)
def test_reasoning_that_is_not_wanted_is_not_told(server: Running, fields: dict) -> None:
    whole = server.post(CHAT, messages=ASKED, **fields).json()
    assert "reasoning_content" not in whole["choices"][0]["message"]
    assert whole["choices"][0]["message"]["content"] == "I look"
    assert whole["usage"]["completion_tokens"] > len(THOUGHT)
    with server.http.stream("POST", CHAT, json={"messages": ASKED, "stream": True, **fields}) as response:
        chunks = [event for event in parse_events(response.iter_lines()) if event != "[DONE]"]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "I look"
    assert not any("reasoning_content" in delta for delta in deltas)


def test_a_stream_shows_that_it_lives_while_it_tells_no_reasoning(monkeypatch, server: Running) -> None:
    seconds = count()
    monkeypatch.setattr(Answers, "ready", lambda answers: [])  # so that every token comes alone
    monkeypatch.setattr("hybrid.server.stream.monotonic", lambda: 10.0 * next(seconds))
    body = {"messages": ASKED, "stream": True}
    for fields, pings in (({}, False), ({"include_reasoning": False}, True)):
        with server.http.stream("POST", CHAT, json={**body, **fields}) as response:
            assert (list(response.iter_lines()).count(": ping") >= 2) == pings


def test_reasoning_is_told_where_it_is_asked_for_as_where_it_is_not(server: Running) -> None:
    for fields in ({}, {"include_reasoning": True, "separate_reasoning": True, "reasoning_format": "auto"}):
        message = server.post(CHAT, messages=ASKED, **fields).json()["choices"][0]["message"]
        assert message["reasoning_content"] == THOUGHT


@pytest.mark.parametrize(("path", "asked"), [(CHAT, {"messages": ASKED}), (COMPLETE, {"prompt": "Rain?///."})])
def test_usage_so_far_is_in_every_chunk_that_asks_for_it(server: Running, path: str, asked: dict) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**asked, "max_tokens": 9, "stream": True, "stream_options": options}
    with server.http.stream("POST", path, json=body) as response:
        chunks = [event for event in parse_events(response.iter_lines()) if event != "[DONE]"]
    told = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert told == sorted(told) and told[0] < told[-1] == 9 and chunks[-1]["choices"] == []
    body["stream_options"] = {"continuous_usage_stats": True}
    with server.http.stream("POST", path, json=body) as response:
        assert not any("usage" in event for event in parse_events(response.iter_lines()) if event != "[DONE]")


def test_minus_one_is_as_many_tokens_as_there_are(server: Running) -> None:
    for fields in ({"max_tokens": -1}, {"max_completion_tokens": -1}):
        (choice,) = server.post(CHAT, messages=ASKED, **fields).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("I look", "stop")
    (choice,) = server.post(COMPLETE, prompt="(u)Rain?///.", max_tokens=-1).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"].endswith("I look")
    assert server.post("/v1/responses", input="Rain?", max_output_tokens=-1).json()["status"] == "completed"
    for limit in (-1, -2):
        asked = {"model": "tiny", "messages": ASKED, "options": {"num_predict": limit}, "stream": False}
        assert server.post("/api/chat", **asked).json()["done_reason"] == "stop"


NO_EFFECT = {
    "cache_prompt": True, "id_slot": -1, "timings_per_token": True, "return_progress": False, "request_id": "a",
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "a",
    "prompt_cache_key": "a", "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"},
    "best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "typical_p": 1, "mirostat": 0, "xtc_probability": 0.0,
    "dry_multiplier": 0, "dynatemp_range": 0, "logit_bias": {}, "stop": [],
}  # fmt: skip


@pytest.mark.parametrize(("path", "asked"), [(CHAT, {"messages": ASKED}), (COMPLETE, {"prompt": "Rain?///."})])
def test_what_asks_for_nothing_changes_nothing(server: Running, path: str, asked: dict) -> None:
    body = {**asked, "max_tokens": 3, "seed": 1}
    plain, more = server.post(path, **body), server.post(path, **body, **NO_EFFECT)
    assert more.status_code == 200, more.text
    assert plain.json()["choices"] == more.json()["choices"]


def test_marks_for_a_cache_do_not_reach_the_prompt(server: Running) -> None:
    marked = {**TOOL, "cache_control": {"type": "ephemeral"}}
    prompts = [server.post("/apply-template", messages=ASKED, tools=[tool]).json()["prompt"] for tool in (TOOL, marked)]
    assert prompts[0] == prompts[1] and json.dumps(TOOL["function"]["name"]) in prompts[0]


def test_what_cannot_be_done_says_what_to_do_instead(server: Running) -> None:
    for name, value, words in (("functions", [TOOL], "send tools"), ("web_search_options", {}, "as a tool")):
        error = server.post(CHAT, messages=ASKED, **{name: value}).json()["error"]
        assert error["param"] == name and words in error["message"]
    assert "only continued" in server.post(COMPLETE, prompt="a", suffix="b").json()["error"]["message"]


def test_a_text_to_stop_at_may_be_long_wherever_it_is_given(server: Running) -> None:
    stop, many = "a text of more than sixteen letters", ["a"] * 17
    for path, asked, options in (
        (COMPLETE, {"prompt": "a", "max_tokens": 1}, {}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 1, "enable_thinking": False}, {}),
        ("/api/chat", {"model": "tiny", "messages": ASKED}, {"num_predict": 1}),
    ):
        for given, status in ((stop, 200), ([stop], 200), (many, 400)):
            body = {**asked, "options": {**options, "stop": given}} if options else {**asked, "stop": given}
            reply = server.post(path, **body)
            assert reply.status_code == status and (status == 200 or "stop" in reply.text), reply.text


def test_tools_of_anthropic_that_no_model_is_told_of_say_why(server: Running) -> None:
    for kind, words in (
        ("computer_20250124", "pictures"),
        ("computer_toolset_20260801", "pictures"),
        ("web_search_20250305", "would run on the server"),
        ("bash_code_execution_20250825", "would run on the server"),
        ("bash_", "would run on the server"),
        ("bash_٣", "would run on the server"),
    ):
        tools = [{"type": kind, "name": "x"}]
        reply = server.post("/v1/messages", messages=ASKED, max_tokens=1, tools=tools)
        assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text
