"""Custom tools in chats, and choices among tools, as the package `openai` sends and reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from scripted_model import Model  # noqa: E402
from server_rig import Running, running  # noqa: E402
from test_server_tools import SAID, SOURCE, call  # noqa: E402

from hybrid.text.chat_template import ChatTemplate  # noqa: E402

ASKED = [{"role": "user", "content": "Go"}]
GRAMMAR = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: X"}}
PATCH = {"type": "custom", "custom": {"name": "apply_patch", "description": "Edits", "format": GRAMMAR}}
SHELL = {"type": "function", "function": {"name": "shell", "parameters": {"type": "object"}, "strict": False}}
TOOLS = [SHELL, PATCH]


@pytest.fixture(scope="module")
def model() -> Model:
    calls = call("apply_patch", input=SAID) + call("shell")
    return Model(calls, template=ChatTemplate(SOURCE), max_seq_len=900)


@pytest.fixture(scope="module")
def server(model: Model):
    with running(model.llm) as server:
        yield server


@pytest.fixture
def client(server: Running):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASKED, "tools": TOOLS, **more})


def offered(model: Model) -> str:
    return model.prompts[-1].split("(u)")[0]


def test_a_custom_tool_is_called_and_its_call_goes_back_to_the_template(client, model: Model) -> None:
    said = ask(client).choices[0].message
    patch, shell = said.tool_calls
    assert (patch.type, patch.custom.name, patch.custom.input) == ("custom", "apply_patch", SAID)
    assert (shell.type, shell.function.name, shell.function.arguments) == ("function", "shell", "{}")
    assert "apply_patch:Edits" in offered(model) and "start: X" in offered(model)
    result = {"role": "tool", "tool_call_id": patch.id, "content": "Done"}
    ask(client, messages=[*ASKED, said, result], max_tokens=1)
    back = json.dumps({"input": SAID}, ensure_ascii=False)
    assert f"(u)Go(a)[apply_patch {back}][shell" in model.prompts[-1].replace("\\u00e4", "ä").replace("None", "")


def test_a_custom_call_in_a_stream_is_whole(client) -> None:
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True)]
    patch, shell = [call for choice in chunks for call in choice.delta.tool_calls or ()]
    assert (patch.index, patch.type, patch.custom) == (0, "custom", {"name": "apply_patch", "input": SAID})
    assert (shell.index, shell.function.name) == (1, "shell") and chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("tool", TOOLS, ids=["function", "custom"])
def test_a_tool_that_is_chosen_is_called(client, tool) -> None:
    kind = tool["type"]
    wanted = {"type": kind, kind: {"name": tool[kind]["name"]}}
    (made,) = ask(client, tool_choice=wanted).choices[0].message.tool_calls
    assert made.type == kind and getattr(made, kind).name == tool[kind]["name"]


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("tool", TOOLS, ids=["function", "custom"])
def test_the_model_is_told_of_the_tools_that_are_allowed_alone(client, model: Model, tool, mode) -> None:
    kind = tool["type"]
    named = {"type": kind, kind: {"name": tool[kind]["name"]}}
    other = {"shell": "apply_patch", "apply_patch": "shell"}[tool[kind]["name"]]
    ask(client, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}})
    assert tool[kind]["name"] in offered(model) and other not in offered(model)


def test_of_allowed_tools_one_must_be_called_if_that_is_required(server: Running) -> None:
    """A model that would say something else."""
    silent = Model("no", template=ChatTemplate(SOURCE.replace("<think> ", "")), max_seq_len=900)
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "stop"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    stop = {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}
    words = {"temperature": 0, "max_tokens": 400, "parallel_tool_calls": False}
    with running(silent.llm) as other:
        tools = [*TOOLS, {"type": "function", "function": stop}]
        body = {"messages": ASKED, "tools": tools, "tool_choice": choice, **words}
        message = other.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
        assert [made["function"]["name"] for made in message["tool_calls"]] == ["stop"]
        allowed["mode"] = "auto"
        assert other.post("/v1/chat/completions", **body).json()["choices"][0]["message"]["content"] == "no"


def allowing(*tools: Any, mode: str = "auto") -> dict[str, Any]:
    return {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0: a tool must be an object whose type is"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools.0.custom.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
        (allowing({"type": "function", "function": {"name": "x"}}), "'x'"),
        (allowing({"type": "function"}), "with a name"),
        (allowing("shell"), "with a name"),
        ({"tools": [], **allowing("shell")}, "with a name"),
        ({"tools": [], **allowing({"type": "function", "function": {"name": "shell"}})}, "'shell'"),
        (allowing(mode="any"), "'any'"),
        (allowing(mode="required"), "there are no tools"),
        ({"tool_choice": {"type": "allowed_tools"}}, "must be an object"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": {"type": "hosted"}}, "'hosted'"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"type": "custom", "id": "a"}]}]}, "messages.1"),
    ],
    ids=lambda value: f"{value!r:.60}",
)
def test_what_cannot_be_is_refused(server: Running, more: dict, words: str) -> None:
    reply = server.post("/v1/chat/completions", **{"messages": ASKED, "tools": TOOLS, **more})
    assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text
