"""Requests exactly as clients send them: langchain's for OpenAI, Anthropic and Ollama, litellm, and agents."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from scripted_model import Model  # noqa: E402
from server_rig import running  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.text.chat_template import ChatTemplate  # noqa: E402

ASKED = '"messages":[{"content":"Rain?","role":"user"}]'
WEATHER = (
    '{"type":"function","function":{"name":"weather","description":"Weather","parameters":'
    '{"properties":{"place":{"type":"string"}},"required":["place"],"type":"object"}}}'
)
CUSTOM = '{"name":"weather","input_schema":{"type":"object","properties":{"place":{"type":"string"}}},"type":"custom"}'
CALL = '{"type":"function","id":"d916a6319","function":{"name":"weather","arguments":"{\\"place\\": \\"Rome\\"}"}}'
BODIES = [
    # langchain-openai: chat, with tools and their results, and responses
    ("/v1/chat/completions", f'{{"model":"tiny","stream":false,{ASKED},"temperature":0.0,"tools":[{WEATHER}]}}'),
    (
        "/v1/chat/completions",
        f'{{"model":"tiny","stream":false,{ASKED[:-1]},{{"content":"I look","role":"assistant","tool_calls":[{CALL}]}},'
        f'{{"content":"Wet","role":"tool","tool_call_id":"d916a6319"}}],"temperature":0.0,"tools":[{WEATHER}]}}',
    ),
    *(
        (
            "/v1/chat/completions",
            f'{{"model":"tiny",{ASKED[:-1]},{{{content}"role":"assistant","tool_calls":[{CALL}]}},'
            f'{{"content":"Wet","role":"tool","tool_call_id":"d916a6319"}}],"temperature":0.0,"tools":[{WEATHER}]}}',
        )
        for content in ('"content":null,', "")  # as the package openai sends its own reply back, and as agents do
    ),
    (
        "/v1/responses",
        '{"model":"tiny","stream":false,"input":[{"content":"Rain?","role":"user","type":"message"},{"id":"rs_a8",'
        '"summary":[],"type":"reasoning","content":[{"text":"Hm","type":"reasoning_text"}],"status":"completed"},'
        '{"type":"message","content":[{"type":"output_text","text":"I look","annotations":[]}],"role":"assistant","id":'
        '"msg_60"},{"arguments":"{\\"place\\": \\"Rome\\"}","call_id":"20f05daaf","name":"weather","type":'
        '"function_call","id":"fc_dd","status":"completed"},{"content":"So?","role":"user","type":"message"}],'
        '"temperature":0.0}',
    ),
    # langchain-anthropic and litellm
    ("/v1/messages", f'{{"max_tokens":200,{ASKED},"model":"tiny","temperature":0}}'),
    (
        "/v1/messages",
        '{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "Rain?"}]}], '
        f'"temperature": 0, "max_tokens": 100, "tools": [{CUSTOM}]}}',
    ),
    # langchain-ollama and litellm
    ("/api/chat", f'{{"model":"tiny","stream":false,"options":{{"temperature":0.0}},{ASKED},"tools":[],"think":true}}'),
    (
        "/api/chat",
        '{"model": "tiny", "messages": [{"role": "user", "content": "Rain?", "images": []}], "options": '
        f'{{"temperature": 0, "num_predict": 100}}, "stream": false, "tools": [{WEATHER}]}}',
    ),
    (
        "/api/chat",
        '{"model":"tiny","stream":false,"options":{"temperature":0.0},"messages":[{"role":"user","content":"Rain?"},'
        '{"role":"assistant","content":"I look","thinking":"Hm","tool_calls":[{"function":{"name":"weather",'
        f'"arguments":{{"place":"Rome"}}}}}}]}},{{"role":"tool","content":"Wet"}}],"tools":[{WEATHER}],"think":true}}',
    ),
    (
        "/api/generate",
        '{"model": "tiny", "prompt": "### User:\\nRain?\\n\\n", "options": {"temperature": 0, "num_predict": 100}, '
        '"stream": false, "images": []}',
    ),
    (
        "/api/generate",
        '{"model":"tiny","stream":false,"options":{"temperature":0.0},"format":"","prompt":"Rain?"}',
    ),
    # agents, by what they are known to send
    (
        "/v1/messages",
        '{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"Rain?","cache_control":{"type":'
        '"ephemeral"}}]}],"system":[{"type":"text","text":"You are an agent","cache_control":{"type":"ephemeral"}}],'
        f'"tools":[{CUSTOM}],"tool_choice":{{"type":"auto"}},"metadata":{{"user_id":"a"}},"max_tokens":32000,"thinking":'
        '{"type":"adaptive"},"context_management":{"edits":[{"type":"clear_thinking_20251015","keep":"all"}]},'
        '"output_config":{"effort":"medium"},"temperature":0}',
    ),
    (
        "/v1/responses",
        '{"model":"tiny","instructions":"You are an agent","input":[{"type":"message","role":"user","content":[{"type":'
        '"input_text","text":"Rain?"}]}],"tools":[{"type":"function","name":"weather","description":"","strict":false,'
        '"parameters":{"type":"object"}}],"tool_choice":"auto","parallel_tool_calls":false,"reasoning":{"effort":'
        '"medium","summary":"auto"},"store":false,"include":["reasoning.encrypted_content"],"prompt_cache_key":"a",'
        '"client_metadata":{"a":"b"},"temperature":0}',
    ),
]


@pytest.fixture(scope="module")
def server():
    template = "{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% endfor %}.{# <think> <tool_call> #}"
    with running(Model("<think>Hm</think>I look", template=ChatTemplate(template), max_seq_len=900).llm) as server:
        yield server


@pytest.mark.parametrize(("path", "body"), BODIES, ids=lambda text: text[:24])
def test_a_request_of_a_client_is_answered(server, path: str, body: str) -> None:
    response = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    assert text_of(response.json()) == "I look"
    assert server.post(path, **{**json.loads(body), "stream": True}).status_code == 200


def test_the_embedded_model_answers_every_one_of_them() -> None:
    with running(LLM()) as server:
        for path, body in BODIES:
            asked = {
                **json.loads(body),
                **({"max_tokens": 2} if "/api" not in path and "responses" not in path else {}),
            }
            reply = server.post(path, **asked)
            assert reply.status_code == 200, reply.text


def text_of(reply: dict[str, Any]) -> str:
    if "choices" in reply:
        return reply["choices"][0]["message"]["content"]
    if "output" in reply:
        return "".join(
            part["text"] for item in reply["output"] if item["type"] == "message" for part in item["content"]
        )
    if "content" in reply:
        return "".join(block["text"] for block in reply["content"] if block["type"] == "text")
    return reply["response"] if "response" in reply else reply["message"]["content"]
