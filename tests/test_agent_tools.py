"""What Codex and Claude Code offer beside functions: tools that OpenAI's models know by themselves, searches for tools,
tools of the server; as the packages `openai` and `anthropic` send and read them.
"""

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
from test_server_tools import FOLDER, SEARCH, SHELL, SOURCE, call  # noqa: E402

from hybrid.server.known_tools import known_tool  # noqa: E402
from hybrid.text.chat_template import ChatTemplate  # noqa: E402

LOCAL = {"type": "local_shell"}
FINDER = {
    "type": "tool_search",
    "execution": "client",
    "description": "Finds tools of MCP servers.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
RAN = {"command": ["ls", "-l"], "working_directory": "/tmp", "timeout_ms": 900}
HEADER = "x-hybrid-tools-left-out"


def serving(*answers: str) -> Model:
    return Model(
        *answers, template=ChatTemplate(SOURCE.replace("<think> ", "")), max_seq_len=2000, kv_token_budget=4000
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return serving(call("local_shell", **RAN) + call("tool_search", query="files"))


@pytest.fixture(scope="module")
def server(model: Model):
    with running(model.llm) as server:
        yield server


@pytest.fixture
def client(server: Running):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_shell_and_a_search_are_called_as_the_client_knows_them(client, model: Model) -> None:
    tools = [LOCAL, FINDER, SEARCH]
    whole = client.responses.create(model="tiny", input="Go", tools=tools)
    with client.responses.stream(model="tiny", input="Go", tools=tools) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    for reply in (whole, streamed):
        shell, search = reply.output
        assert (shell.type, shell.action.command, shell.action.timeout_ms) == ("local_shell_call", ["ls", "-l"], 900)
        assert (shell.action.type, shell.action.working_directory, shell.action.env) == ("exec", "/tmp", {})
        assert (search.type, search.arguments, search.execution) == ("tool_search_call", {"query": "files"}, "client")
        assert [tool.type for tool in reply.tools] == ["local_shell", "tool_search"]
    offered = model.prompts[-1].split("(u)")[0]
    assert "local_shell:Runs a command" in offered and "tool_search:Finds tools of MCP servers." in offered


def test_what_a_search_has_found_can_be_called(client, model: Model) -> None:
    shell, search = client.responses.create(model="tiny", input="Go", tools=[LOCAL, FINDER]).output
    ran = {"type": "local_shell_call_output", "id": shell.call_id, "output": "a.txt"}
    found = {"type": "tool_search_output", "call_id": search.call_id, "execution": "client", "tools": [FOLDER, SHELL]}
    items = [{"role": "user", "content": "Go"}, shell, search, ran, found, found]
    client.responses.create(model="tiny", input=items, tools=[LOCAL, FINDER], max_output_tokens=1)
    offered, _, said = model.prompts[-1].partition("(u)")
    assert "mcp__files__list:" in offered and "mcp__files__apply_patch:" in offered and "shell:" in offered
    assert f"[local_shell {json.dumps(RAN)}]" in said and '[tool_search {"query": "files"}]' in said
    assert "(t)a.txt(t)Found: mcp__files__list, mcp__files__apply_patch, shell" in said
    added = {"type": "additional_tools", "role": "developer", "tools": [SHELL]}
    client.responses.create(model="tiny", input=[added, items[0]], max_output_tokens=1)
    assert model.prompts[-1].startswith("shell:")


def test_a_command_that_is_a_text_is_for_a_shell_and_nonsense_for_the_client(server: Running) -> None:
    for command, words in (("ls -l", ["sh", "-c", "ls -l"]), ([1, "a"], ["a"]), (7, [])):
        with running(serving(call("local_shell", command=command, timeout_ms=True)).llm) as other:
            (item,) = other.post("/v1/responses", input="Go", tools=[LOCAL]).json()["output"]
            assert item["action"]["command"] == words and item["action"]["timeout_ms"] is None


def test_tools_that_nobody_here_can_run_are_named_in_a_header(server: Running, model: Model) -> None:
    odd = {"type": "odd\r\nset-cookie: a"}
    hosted = [SEARCH, {"type": "tool_search"}, {"type": "mcp", "server_label": "a"}, odd]
    for stream in (False, True):
        body = {"input": "Go", "tools": [SHELL, *hosted], "max_output_tokens": 1, "stream": stream}
        reply = server.post("/v1/responses", **body)
        assert reply.status_code == 200 and reply.headers[HEADER] == "mcp, other, tool_search, web_search"
        assert "set-cookie" not in reply.headers
    assert model.prompts[-1].startswith("shell:") and "web_search" not in model.prompts[-1]
    assert HEADER not in server.post("/v1/responses", input="Go", tools=[SHELL], max_output_tokens=1).headers


COMMANDS = {"commands": ["ls -l", "pwd"], "timeout_ms": 900}
CHANGE = {"type": "update_file", "path": "a", "diff": "@@\n-a\n+b"}
REMOVAL = {"type": "delete_file", "path": "b"}
HOSTED = {"type": "shell", "environment": {"type": "container_auto"}}


def test_a_shell_of_commands_and_patches_are_called_as_the_client_knows_them() -> None:
    called = call("shell", **COMMANDS) + call("apply_patch", **CHANGE) + call("apply_patch", **REMOVAL)
    tools = [{"type": "shell", "environment": {"type": "local"}}, {"type": "apply_patch"}]
    model = serving(called)
    with (
        running(model.llm) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client,
    ):
        whole = client.responses.create(model="tiny", input="Go", tools=tools)
        with client.responses.stream(model="tiny", input="Go", tools=tools) as stream:
            streamed = stream.get_final_response()
        for reply in (whole, streamed):
            shell, change, removal = reply.output
            assert type(shell).__name__ == "ResponseFunctionShellToolCall" and shell.status == "completed"
            assert (shell.action.commands, shell.action.timeout_ms) == (COMMANDS["commands"], 900)
            assert shell.environment.type == "local"
            assert type(change).__name__ == "ResponseApplyPatchToolCall" and change.operation.to_dict() == CHANGE
            assert removal.operation.to_dict() == REMOVAL
            assert [tool.to_dict() for tool in reply.tools] == tools
        offered = model.prompts[-1].split("(u)")[0]
        assert "shell:Runs commands" in offered and "apply_patch:Creates" in offered
        ran = {"stdout": "a\n", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}
        late = {"stdout": "", "stderr": "slow", "outcome": {"type": "timeout"}}
        wrong = {"stdout": "b", "stderr": "", "outcome": {"type": "exit", "exit_code": 2}}
        outputs = [
            {"type": "shell_call_output", "call_id": shell.call_id, "output": [ran, late, wrong]},
            {"type": "apply_patch_call_output", "call_id": change.call_id, "status": "completed", "output": "Changed"},
            {"type": "apply_patch_call_output", "call_id": removal.call_id, "status": "failed"},
        ]
        back = [{"role": "user", "content": "Go"}, *whole.output, *outputs]
        client.responses.create(model="tiny", input=back, tools=tools, max_output_tokens=1)
        said = model.prompts[-1].partition("(u)")[2].replace("\\n", "\n")
        assert f"[shell {json.dumps(COMMANDS)}]" in said and f"[apply_patch {json.dumps(REMOVAL)}]" in said
        assert said.endswith("(t)a\nslow\n(timed out)\nb\n(exit code 2)(t)Changed(t)The patch failed..")


@pytest.mark.parametrize("kind", ["shell", "apply_patch"])
def test_each_can_be_demanded(client, kind: str) -> None:
    words = {"model": "tiny", "input": "Go", "tools": [{"type": "shell"}, {"type": "apply_patch"}]}
    (item,) = client.responses.create(**words, tool_choice={"type": kind}, max_output_tokens=400, temperature=0).output
    assert item.type == f"{kind}_call"


def test_nonsense_in_a_shell_or_a_patch_is_of_the_right_types_for_the_client() -> None:
    for name, arguments, made in (
        ("shell", {"commands": "ls"}, ["ls"]),
        ("shell", {"commands": [7, "ls"], "timeout_ms": True}, ["ls"]),
        ("shell", {}, []),
        ("apply_patch", {"type": "move", "path": 7}, {"type": "update_file", "path": "", "diff": ""}),
        ("apply_patch", {"type": [], "path": "a"}, {"type": "update_file", "path": "a", "diff": ""}),
    ):
        with running(serving(call(name, **arguments)).llm) as server:
            (item,) = server.post("/v1/responses", input="Go", tools=[{"type": name}]).json()["output"]
        assert (item["action"]["commands"] if name == "shell" else item["operation"]) == made


def test_containers_and_pictures_are_left_out_and_named(server: Running, model: Model) -> None:
    tools = [SHELL, HOSTED, {"type": "computer"}]
    reply = server.post("/v1/responses", input="Go", tools=tools, max_output_tokens=1)
    assert reply.headers[HEADER] == "computer, shell" and model.prompts[-1].startswith("shell:")
    for tool, words in ((HOSTED, "run on the server"), ({"type": "computer_use_preview"}, "pictures")):
        assert words in server.post("/v1/responses", input="Go", tools=[tool]).json()["error"]["message"]


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ({"type": "bash_20250124", "name": "bash"}, {"command": "ls"}, "bash:Runs a command"),
        (
            {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool", "max_characters": 100},
            {"command": "view", "path": "/a"},
            "str_replace_based_edit_tool:Shows and edits",
        ),
        ({"type": "memory_20250818", "name": "memory"}, {"command": "view", "path": "/memories"}, "memory:Keeps"),
    ],
    ids=["bash", "editor", "memory"],
)
def test_tools_that_anthropic_has_described_are_offered_as_functions(
    tool: dict[str, Any], arguments: dict[str, Any], told: str
) -> None:
    anthropic, model = pytest.importorskip("anthropic"), serving(call(tool["name"], **arguments))
    words = {"model": "tiny", "max_tokens": 300, "messages": [{"role": "user", "content": "Go"}], "tools": [tool]}
    with (
        running(model.llm) as server,
        anthropic.Anthropic(base_url=server.address, api_key="any", max_retries=0) as client,
    ):
        whole = client.messages.create(**words)
        with client.messages.stream(**words) as stream:
            streamed = stream.get_final_message()
        beta = client.beta.messages.create(**words, betas=["context-management-2025-06-27"])
        for message in (whole, streamed, beta):
            (used,) = message.content
            assert (used.type, used.name, used.input) == ("tool_use", tool["name"], arguments)
        assert told in model.prompts[-1]
        counted = client.messages.count_tokens(model="tiny", messages=words["messages"], tools=[tool])
        assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


@pytest.mark.parametrize(("version", "inserted"), [("20250124", "new_str"), ("20250728", "insert_text")])
def test_editors_insert_the_argument_that_anthropics_models_give(version: str, inserted: str) -> None:
    """The later ones: what its API answers, anthropics/anthropic-sdk-python issue 1155."""
    editor = known_tool(f"text_editor_{version}")
    assert editor and f"insert puts {inserted} behind" in editor.description
    assert ("insert_text" in editor.parameters["properties"]) == (inserted == "insert_text")


@pytest.mark.parametrize("version", ["", "9" * 5000, "²", "-1", "2025\n"])
def test_what_is_no_version_makes_no_tool(version: str) -> None:
    assert known_tool(f"text_editor_{version}") is None


def test_the_package_of_anthropic_runs_a_memory() -> None:
    """Its tool runner calls what it is told to, and sends back what that has returned. It asks the server to keep the
    conversation first, and goes on without that where it is told that this cannot be.
    """
    anthropic = pytest.importorskip("anthropic")
    tools = pytest.importorskip("anthropic.lib.tools")
    seen = []

    class Memory(tools.BetaAbstractMemoryTool):
        def view(self, command: Any) -> str:
            seen.append(command.path)
            return "notes"

        create = str_replace = insert = delete = rename = view

    template = ChatTemplate(SOURCE.replace("{{ t.function.description }}", "").replace("<think> ", ""))
    model = Model(call("memory", command="view", path="/memories"), "Well", template=template)
    with (
        running(model.llm) as server,
        anthropic.Anthropic(base_url=server.address, api_key="any", max_retries=0) as client,
    ):
        runner = client.beta.messages.tool_runner(
            model="tiny", max_tokens=300, tools=[Memory()], messages=[{"role": "user", "content": "Go"}]
        )
        assert runner.until_done().content[0].text == "Well"
        kept = {"type": "continue", "previous_message_id": "msg_1"}
        words = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "Go"}]}
        with pytest.raises(anthropic.BadRequestError, match="keeps nothing") as error:
            client.beta.messages.create(**words, thread=kept)
        assert error.value.body["error"]["details"] == {"error_code": "thread_unsupported_request"}
    assert seen == ["/memories"] and model.prompts[-1].endswith("(t)notes.")


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_of_responses(client, model: Model, mode: str) -> None:
    inner = {"type": "function", "name": "list", "namespace": "mcp__files"}
    choice = {"type": "allowed_tools", "mode": mode, "tools": [LOCAL, inner, {"type": "image_generation"}]}
    tools = [LOCAL, FINDER, FOLDER, SHELL]
    client.responses.create(model="tiny", input="Go", tools=tools, tool_choice=choice, max_output_tokens=1)
    offered = model.prompts[-1].split("(u)")[0]
    assert "local_shell:" in offered and "mcp__files__list:" in offered
    assert "tool_search" not in offered and "apply_patch" not in offered


def test_a_shell_that_must_be_called_is(client) -> None:
    words = {"model": "tiny", "input": "Go", "tools": [FINDER, LOCAL], "max_output_tokens": 400, "temperature": 0}
    (item,) = client.responses.create(**words, tool_choice={"type": "local_shell"}).output
    assert item.type == "local_shell_call"


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "tool_search"}]},
        {"tools": [LOCAL, LOCAL]},
        {"tools": [LOCAL], "tool_choice": {"type": "web_search"}},
        {"tools": [LOCAL], "tool_choice": {"type": ["local_shell"]}},
        {"tools": [LOCAL], "tool_choice": {"type": "allowed_tools"}},
        {"tools": [LOCAL], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [SEARCH]}},
        {"tools": [LOCAL], "tool_choice": {"type": "allowed_tools", "mode": [], "tools": [LOCAL]}},
        {"input": [{"type": "tool_search_output", "call_id": "a", "tools": {}}]},
        {"input": [{"type": "additional_tools", "tools": [7]}]},
        {"input": [{"type": "additional_tools", "tools": [{"type": []}]}]},
        {"input": [{"type": "local_shell_call_output", "output": "a"}]},
        {"input": [{"type": "local_shell_call", "action": 7}]},
        {"input": [{"type": "shell_call_output", "call_id": "a", "output": "b"}]},
        {"input": [{"type": "shell_call_output", "call_id": "a", "output": ["b"]}]},
        {"input": [{"type": "shell_call", "action": {"commands": ["a"]}}]},
        {"input": [{"type": "apply_patch_call_output", "call_id": "a", "output": 7}]},
        {"tools": [{"type": "shell", "environment": "local"}]},
    ],
    ids=lambda value: f"{value!r:.60}",
)
def test_what_cannot_be_is_refused(server: Running, more: dict[str, Any]) -> None:
    reply = server.post("/v1/responses", **{"input": "Go", **more})
    assert reply.status_code == 400, reply.text


def test_what_the_client_of_anthropic_chooses() -> None:
    """A model that would call nothing."""
    anthropic, model = pytest.importorskip("anthropic"), serving("no")
    schema = {"type": "object", "additionalProperties": False}
    tools = [{"name": name, "input_schema": schema} for name in ("local_shell", "tool_search")]
    searches = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    words = {"model": "tiny", "max_tokens": 300, "messages": [{"role": "user", "content": "Go"}]}
    with (
        running(model.llm) as server,
        anthropic.Anthropic(base_url=server.address, api_key="any", max_retries=0) as client,
    ):
        for choice, count in (
            ({"type": "auto"}, 0),
            ({"type": "any"}, 1),
            ({"type": "any", "disable_parallel_tool_use": True}, 1),
            ({"type": "tool", "name": "local_shell"}, 1),
            ({"type": "none"}, 0),
        ):
            said = {**words, "tools": tools, "tool_choice": choice}
            whole = client.messages.create(**said)
            with client.messages.stream(**said) as stream:
                streamed = stream.get_final_message()
            beta = client.beta.messages.create(**said, betas=["a-beta"])
            for message in (whole, streamed, beta):
                assert [block.type for block in message.content].count("tool_use") == count
            assert client.messages.count_tokens(
                model="tiny", messages=words["messages"], tools=tools, tool_choice=choice
            )
        raw = client.messages.with_raw_response.create(**words, tools=[*tools, searches])
        assert raw.headers[HEADER] == "web_search_20250305" and "web_search" not in model.prompts[-1]
        with pytest.raises(anthropic.BadRequestError, match="would run on the server"):
            client.messages.create(**words, tools=[searches])
