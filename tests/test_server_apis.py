"""One answer as the APIs of Anthropic, OpenAI's responses and Ollama write it, whole and streamed."""

from __future__ import annotations

import json
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from dummy_engine import WATCHDOG  # noqa: E402
from scripted_model import Model  # noqa: E402
from server_rig import Running, running  # noqa: E402

from hybrid.text.chat_template import ChatTemplate  # noqa: E402

SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
CALL = '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'
ROME = {"place": "Rome"}
MESSAGES, RESPONSES, CHAT, GENERATE = "/v1/messages", "/v1/responses", "/api/chat", "/api/generate"
ASKED = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(scope="module")
def model() -> Model:
    template = "{{ tools|tojson if tools }}{% for m in messages %}({{ m.role[0] }}){{ m.content }}"
    template += "{% for c in m.tool_calls or () %}[{{ c.function.name }}{{ c.function.arguments.place }}]{% endfor %}"
    template += "{{ m.reasoning_content }}{% endfor %}{{ enable_thinking }}."
    return Model(
        f"<think>Hm</think>I look{CALL}", template=ChatTemplate(template + "{# <think> <tool_call> #}"), max_seq_len=900
    )


@pytest.fixture(scope="module")
def server(model: Model):
    with running(model.llm) as server:
        yield server


def lines_of(server: Running, path: str, **body) -> list[str]:
    with server.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        return [line for line in response.iter_lines() if line]


def events_of(server: Running, path: str, **body) -> list[dict]:
    """Events, whose names are their types."""
    lines = lines_of(server, path, stream=True, **body)
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [event["type"] for event in events]
    return events


TOOL = {"name": "weather", "description": "The weather.", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
OLLAMA_TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def test_a_message_has_blocks_of_thinking_text_and_tools(server) -> None:
    words = {"model": "tiny", "max_tokens": 200, "messages": ASKED, "temperature": 0, "tools": [TOOL]}
    reply = server.post(MESSAGES, **words).json()
    thinking, text, use = reply["content"]
    assert (thinking["thinking"], text["text"], use["name"], use["input"]) == ("Hm", "I look", "weather", ROME)
    assert (reply["type"], reply["role"], reply["stop_reason"]) == ("message", "assistant", "tool_use")
    events = events_of(server, MESSAGES, **words)
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == "I look"
    assert json.loads("".join(delta.get("partial_json", "") for delta in deltas)) == ROME
    assert events[0]["message"]["content"] == [] and events[-2]["delta"]["stop_reason"] == "tool_use"
    whole = reply["usage"]["input_tokens"] + reply["usage"]["cache_read_input_tokens"]
    assert events[0]["message"]["usage"]["input_tokens"] == whole
    counted = server.post(f"{MESSAGES}/count_tokens", model="tiny", messages=ASKED, tools=[TOOL]).json()
    assert counted == {"input_tokens": whole}


def test_reasons_of_a_message(server) -> None:
    words = {"model": "tiny", "messages": ASKED, "max_tokens": 200, "temperature": 0}
    assert server.post(MESSAGES, **{**words, "max_tokens": 3}).json()["stop_reason"] == "max_tokens"
    stopped = server.post(MESSAGES, **words, stop_sequences=["zebra", "look"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "look")
    assert server.post(MESSAGES, **words).json()["stop_reason"] == "tool_use"


def test_what_an_agent_sends_of_a_conversation_reaches_the_template(server, model) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Rain?", **cached}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                {"type": "text", "text": "I look"},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": ROME},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "Wet"}],
                    **cached,
                },
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    more = {"metadata": {"user_id": "x"}, "context_management": {"edits": []}, "thinking": {"type": "disabled"}}
    system = [{"type": "text", "text": "Be brief", **cached}, {"type": "text", "text": "Be kind"}]
    body = {"model": "tiny", "max_tokens": 4, "messages": messages, "system": system, "tools": [{**TOOL, **cached}]}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01,b", "x-api-key": "any"}
    assert server.http.post(f"{MESSAGES}?beta=true", json={**body, **more}, headers=headers).status_code == 200
    expected = "(s)Be brief\nBe kind(u)Rain?(a)I look[weatherRome]Hm(t)Wet(u)So?False."
    assert model.prompts[-1].endswith(expected)


def test_a_response_has_items_and_every_event(server) -> None:
    words = {"model": "tiny", "input": "Rain?", "temperature": 0, "tools": [FUNCTION], "max_output_tokens": 200}
    reply = server.post(RESPONSES, **words).json()
    reasoning, message, call = reply["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert message["content"][0]["text"] == "I look" and message["status"] == "completed"
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "weather", ROME)
    assert (reply["object"], reply["status"], reply["store"]) == ("response", "completed", False)
    assert reply["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    events = events_of(server, RESPONSES, **words)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta", "output_text.done",
        "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 3
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message", "function_call"]
    short = events_of(server, RESPONSES, **{**words, "max_output_tokens": 14})[-1]["response"]
    assert (short["status"], short["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_items_of_a_conversation_reach_the_template(server, model) -> None:
    items = [
        {"role": "developer", "content": "Be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": json.dumps(ROME)},
        {"type": "function_call_output", "call_id": "c1", "output": "Wet"},
    ]
    more = {"store": False, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}}
    body = {"input": items, "instructions": "Be brief", "max_output_tokens": 3, **more}
    assert server.post(RESPONSES, **body).status_code == 200
    expected = "(s)Be brief\n\nBe kind(u)Rain?(a)I look[weatherRome]Hm(t)Wet."
    assert model.prompts[-1] == expected
    reply = server.http.get(f"{RESPONSES}/resp_1")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "response_not_found")


def test_a_chat_of_ollama_is_lines_with_times(server, model) -> None:
    words = {"model": "tiny:latest", "messages": ASKED, "tools": [OLLAMA_TOOL], "options": {"temperature": 0}}
    reply = server.post(CHAT, **words, stream=False).json()
    message = reply["message"]
    assert (message["content"], message["thinking"]) == ("I look", "Hm")
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": ROME}
    assert reply["done"] and reply["done_reason"] == "stop" and reply["eval_count"] > 50
    assert all(isinstance(reply[f"{name}_duration"], int) for name in ("total", "load", "prompt_eval", "eval"))
    lines = [json.loads(line) for line in lines_of(server, CHAT, **words)]
    assert "".join(line["message"]["content"] for line in lines) == "I look"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-2]["message"]["tool_calls"] and lines[-1]["model"] == "tiny:latest"
    said = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": ROME}}]}
    back = [*ASKED, said, {"role": "tool", "content": "Wet", "tool_name": "weather"}]
    server.post(
        CHAT, model="tiny", messages=back, think=False, options={"num_predict": 2, "num_ctx": 4096}, stream=False
    )
    assert model.prompts[-1] == "(u)Rain?(a)[weatherRome](t)WetFalse."
    assert server.post(CHAT, model="tiny", messages=[], keep_alive=-1).json()["done_reason"] == "load"


def test_prompts_of_ollama(server, model) -> None:
    words = {"model": "tiny", "prompt": "Rain?", "system": "Be kind", "stream": False}
    words["options"] = {"num_predict": 17, "temperature": 0}
    reply = server.post(GENERATE, **words).json()
    assert (reply["thinking"], reply["response"], reply["done_reason"]) == ("Hm", "", "length")
    assert model.prompts[-1] == "(s)Be kind(u)Rain?."
    server.post(GENERATE, model="tiny", prompt="As it is.", raw=True, options={"num_predict": 1}, stream=False)
    assert model.prompts[-1] == "As it is."
    lines = [
        json.loads(line)
        for line in lines_of(server, GENERATE, model="tiny", prompt="Rain?", options={"temperature": 0})
    ]
    assert "".join(line["response"] for line in lines).startswith("I look")
    assert server.http.get("/api/version").json()["version"]
    assert server.http.head("/").status_code == 200 and "running" in server.http.get("/").text


REFUSED = {
    MESSAGES: [
        {"max_tokens": 0},
        {"max_tokens": None},
        {"messages": []},
        {"messages": [{"role": "king", "content": "a"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "a"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": "c"}]}]},
        {"messages": [*ASKED, {"role": "assistant", "content": "It"}]},
        {"system": [{"type": "image"}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"name": ""}]},
        {"temperature": 2},
        {"stop_sequences": [""]},
        {"unheard_of": 1},
        {"output_config": {"a": 1}},
        {"output_config": {"effort": 3}},
        {"thinking": {"type": "often"}},
    ],
    RESPONSES: [
        {"input": []},
        {"input": [{"type": "item_reference", "id": "a"}]},
        {"input": [{"type": {}}]},
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        {"input": [{"type": "function_call", "call_id": "a"}]},
        {"input": [{"role": [], "content": "a"}]},
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"tools": [{"type": "web_search"}]},
        {"include": ["message.output_text"]},
        {"max_output_tokens": 0},
        {"unheard_of": 1},
        {"text": {"format": {"type": "picture"}}},
    ],
    CHAT: [
        {"messages": [{"role": "user", "content": "a", "images": ["aa"]}]},
        {"messages": [{"role": "user", "content": ["a"]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": 3}]},
        {"messages": [{"role": {}, "content": "a"}]},
        {"options": {"mirostat": 1}},
        {"options": {"num_predict": -3}},
        {"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}},
        {"options": {"unheard_of": 1}},
        {"think": "much"},
        {"format": "xml"},
        {"unheard_of": 1},
    ],
    GENERATE: [{"suffix": "x"}, {"images": ["aa"]}, {"context": [1]}, {"template": "x"}, {"prompt": 3}],
}
GOOD = {
    MESSAGES: {"messages": ASKED, "max_tokens": 3},
    RESPONSES: {"input": "a"},
    CHAT: {"model": "tiny", "messages": ASKED},
    GENERATE: {"model": "tiny", "prompt": "a"},
}


@pytest.mark.parametrize(("path", "more"), [(path, body) for path, bodies in REFUSED.items() for body in bodies])
def test_what_cannot_be_is_refused_in_the_shape_of_the_api(server, path: str, more: dict) -> None:
    for stream in (False, True):
        response = server.post(path, **{**GOOD[path], **more, "stream": stream})
        assert response.status_code == 400, response.text
        assert next(iter(more)) in message_of(path, response.json()) or path == CHAT
    assert server.idle


def message_of(path: str, body: dict) -> str:
    if path.startswith("/api"):
        return body["error"]
    if path == MESSAGES:
        assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
        return body["error"]["message"]
    return body["error"]["message"] + str(body["error"]["param"])


def test_other_errors_have_the_shape_too(server) -> None:
    assert server.post(MESSAGES, **GOOD[MESSAGES], model="x").json()["error"]["type"] == "not_found_error"
    assert "tiny" in server.post(CHAT, model="x", messages=ASKED).json()["error"]
    assert server.http.get(MESSAGES).json()["type"] == "error"
    assert isinstance(server.http.get("/api/nothing").json()["error"], str)
    with running(None, api_key=("k",)) as closed:
        for path in (MESSAGES, f"{MESSAGES}/count_tokens", RESPONSES, CHAT, GENERATE, "/api/show"):
            assert closed.post(path).status_code == 401
        assert closed.post(MESSAGES).json()["error"]["type"] == "authentication_error"
        for path in ("/api/tags", "/api/ps", "/api/version", f"{RESPONSES}/a"):
            assert closed.http.get(path).status_code == 401


SILENCE = {MESSAGES: "event: ping", RESPONSES: ": ping", CHAT: '"content":""', GENERATE: '"response":""'}


@pytest.mark.parametrize("path", SILENCE)
def test_a_stream_that_waits_says_so(path: str) -> None:
    """The step goes on when the client has heard of it."""
    model, heard = Model("abc"), threading.Event()
    model.fail = lambda batch: heard.wait(WATCHDOG)
    with (
        running(model.llm, ping_seconds=0.01) as server,
        server.http.stream("POST", path, json={**GOOD[path], "stream": True}) as response,
    ):
        lines = response.iter_lines()
        assert any(SILENCE[path] in line for line in lines)
        heard.set()
        assert len(list(lines)) > 1


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES, CHAT, GENERATE])
def test_a_step_that_fails_ends_a_stream_by_an_error(path: str) -> None:
    model = Model("abc")

    def fail(batch) -> None:
        if batch.positions[0] > 1:
            raise RuntimeError("secret")

    with running(model.llm) as server:
        model.fail = fail
        lines = lines_of(server, path, **{**GOOD[path], "stream": True})
        model.fail = lambda batch: None  # so that it heals
        last = json.loads(lines[-1].removeprefix("data: "))
        assert "error" in (last.get("type"), *last) and "secret" not in str(lines)
