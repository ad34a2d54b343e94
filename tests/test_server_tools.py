"""Tools of responses as coding agents send them: custom ones, namespaces, and those that would run on the server."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from scripted_model import Model  # noqa: E402
from server_rig import Running, parse_events, running  # noqa: E402

from hybrid.text.chat_template import ChatTemplate  # noqa: E402

RESPONSES = "/v1/responses"
SOURCE = (
    "{% for t in tools or () %}{{ t.function.name }}:{{ t.function.description }} {% endfor %}"
    "{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% for c in m.tool_calls or () %}"
    "[{{ c.function.name }} {{ c.function.arguments|tojson }}]{% endfor %}{% endfor %}.{# <think> <tool_call> #}"
)
PATCH = {
    "type": "custom", "name": "apply_patch", "description": "Edits",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
}  # fmt: skip
SHELL = {"type": "function", "name": "shell", "parameters": {"type": "object"}, "strict": False}
FOLDER = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files",
    "tools": [{**SHELL, "name": "list"}, PATCH],
}
SEARCH = {"type": "web_search", "external_web_access": False, "search_content_types": ["text"]}
TOOLS = [SHELL, PATCH, FOLDER, SEARCH, {"type": "image_generation", "output_format": "png"}]
SAID = "*** Begin\n+ä"


def call(name: str, **arguments: Any) -> str:
    """As a grammar demands it, so that a model that must call does nothing else."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def model() -> Model:
    calls = call("apply_patch", input=SAID) + call("mcp__files__list", path="a") + call("shell")
    return Model(calls, template=ChatTemplate(SOURCE), max_seq_len=900)


@pytest.fixture(scope="module")
def server(model: Model):
    with running(model.llm) as server:
        yield server


def events_of(server: Running, **body: Any) -> list[dict[str, Any]]:
    with server.http.stream("POST", RESPONSES, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        return list(parse_events(line for line in response.iter_lines() if not line.startswith("event:")))


def test_calls_come_back_as_the_tools_that_they_are(server: Running, model: Model) -> None:
    reply = server.post(RESPONSES, input="Go", tools=TOOLS, tool_choice="auto").json()
    patch, listed, shell = reply["output"]
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", SAID)
    assert (listed["type"], listed["namespace"], listed["name"]) == ("function_call", "mcp__files", "list")
    assert (shell["type"], shell["name"], shell["arguments"]) == ("function_call", "shell", "{}")
    assert "namespace" not in shell and "arguments" not in patch
    offered = model.prompts[-1].split("(u)")[0]
    assert "apply_patch:Edits" in offered and "start: X" in offered
    assert "mcp__files__list:" in offered and "mcp__files__apply_patch:" in offered and "web_search" not in offered


def test_a_reply_has_the_tools_that_were_offered_alone(server: Running) -> None:
    told = server.post(RESPONSES, input="Go", tools=TOOLS, max_output_tokens=1).json()["tools"]
    assert [tool["type"] for tool in told] == ["function", "custom", "namespace"]
    assert told[1] == PATCH and [tool["name"] for tool in told[2]["tools"]] == ["list", "apply_patch"]


def test_a_custom_call_has_its_own_events(server: Running) -> None:
    events = events_of(server, input="Go", tools=TOOLS)
    kinds = [event["type"].removeprefix("response.") for event in events]
    start = kinds.index("output_item.added")
    assert kinds[start : start + 4] == [
        "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done",
    ]  # fmt: skip
    added, delta, done, item = events[start : start + 4]
    assert (added["item"]["input"], delta["delta"], done["input"], item["item"]["input"]) == ("", SAID, SAID, SAID)
    assert added["item"]["id"] == delta["item_id"] == done["item_id"] == item["item"]["id"]
    assert kinds.count("function_call_arguments.done") == 2 and kinds[-1] == "completed"


def test_items_of_such_tools_go_back_to_the_template(server: Running, model: Model) -> None:
    output = server.post(RESPONSES, input="Go", tools=TOOLS).json()["output"]
    result = {"type": "custom_tool_call_output", "call_id": output[0]["call_id"], "output": "Done"}
    searched = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}}
    back = [{"role": "user", "content": "Go"}, searched, *output, result]
    reply = server.post(RESPONSES, input=back, tools=TOOLS, max_output_tokens=1)
    assert reply.status_code == 200, reply.text
    said = json.dumps({"input": SAID}, ensure_ascii=False)
    assert f"(u)Go(a)[apply_patch {said}][mcp__files__list" in model.prompts[-1].replace("\\u00e4", "ä")
    assert model.prompts[-1].endswith("(t)Done.")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [SEARCH]}, "'web_search'"),
        ({"tools": [SHELL, SHELL]}, "'shell'"),
        ({"tools": [{"type": "custom"}]}, "no name"),
        ({"tools": [FOLDER, {**SHELL, "name": "mcp__files__list"}]}, "mcp__files__list"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "web_search"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "name": "x"}}, "x"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b", "namespace": {}, "arguments": ""}]}, "text"),
        ({"input": [{"type": "custom_tool_call", "call_id": "a", "name": "b"}]}, "input"),
    ],
    ids=lambda value: f"{value!r:.50}",
)
def test_what_cannot_be_offered_is_refused(server: Running, more: dict, words: str) -> None:
    reply = server.post(RESPONSES, **{"input": "Go", **more})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text


def test_a_custom_tool_that_must_be_called_is(server: Running) -> None:
    wanted = {"type": "custom", "name": "apply_patch", "namespace": "mcp__files"}
    reply = server.post(RESPONSES, input="Go", tools=TOOLS, tool_choice=wanted, max_output_tokens=300)
    assert reply.status_code == 200, reply.text
    (patch,) = reply.json()["output"]
    assert (patch["type"], patch["namespace"], patch["name"]) == ("custom_tool_call", "mcp__files", "apply_patch")
