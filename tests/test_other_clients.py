"""What instructor, the package of Mistral, langchain and others send to an address of OpenAI's API, as they send it."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from scripted_model import Model  # noqa: E402
from server_rig import Running, running  # noqa: E402
from test_server_tools import SOURCE, call  # noqa: E402

from hybrid.text.chat_template import ChatTemplate  # noqa: E402

CHAT, COMPLETE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
PERSON = (
    '{"properties":{"who":{"type":"string"},"age":{"type":"integer"}},"required":["who","age"],"type":"object",'
    '"additionalProperties":false}'
)
INSTRUCTOR = (  # its mode RESPONSES_TOOLS: the form of a text, and a call that is demanded
    '{"input":[{"role":"user","content":"hi"}],"max_output_tokens":300,"model":"tiny","text":{"format":{"type":'
    f'"json_schema","name":"Person","strict":true,"schema":{PERSON}}}}},"tool_choice":{{"type":"function","name":"Person"}},'
    f'"tools":[{{"type":"function","name":"Person","parameters":{PERSON},"description":"Extracted"}}]}}'
)
MISTRAL = (
    '{"model":"tiny","max_tokens":300,"stream":false,"random_seed":7,"messages":[{"role":"user","content":"hi"}],'
    f'"tools":[{{"type":"function","function":{{"name":"Person","description":"d","strict":false,"parameters":{PERSON}}}}}],'
    '"tool_choice":"any","safe_prompt":false}'
)


@pytest.fixture(scope="module")
def server():
    template = ChatTemplate(SOURCE.replace("<think> ", "").replace("{{ t.function.description }}", ""))
    with running(Model(call("Person", who="Ann", age=7), template=template, max_seq_len=900).llm) as server:
        yield server


def post(server: Running, path: str, body: str) -> Any:
    reply = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_call_that_is_demanded_has_no_text_with_a_form(server: Running) -> None:
    (item,) = post(server, RESPONSES, INSTRUCTOR)["output"]
    assert item["type"] == "function_call" and json.loads(item["arguments"]) == {"who": "Ann", "age": 7}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}
    chat = {**json.loads(MISTRAL), "tool_choice": "required", "response_format": form}
    assert post(server, CHAT, json.dumps(chat))["choices"][0]["finish_reason"] == "tool_calls"


def test_words_of_the_package_of_mistral(server: Running) -> None:
    (called,) = post(server, CHAT, MISTRAL)["choices"][0]["message"]["tool_calls"]
    assert called["function"]["name"] == "Person" and json.loads(called["function"]["arguments"])["age"] == 7
    for words in ({"safe_prompt": True}, {"random_seed": "a"}, {"tool_choice": "any", "tools": []}):
        assert server.post(CHAT, **{**json.loads(MISTRAL), **words}).status_code == 400


def test_a_random_seed_is_a_seed() -> None:
    from hybrid import LLM

    with running(LLM()) as server:
        asked = {"prompt": "Once", "max_tokens": 12}
        texts = [
            server.post(COMPLETE, **asked, **seed).json()["choices"][0]["text"]
            for seed in ({"seed": 5}, {"random_seed": 5}, {"seed": 5, "random_seed": 6}, {"random_seed": 6})
        ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_the_best_of_as_many_as_are_wanted_are_all(server: Running) -> None:
    asked = {"prompt": "a.", "max_tokens": 1, "n": 2}
    assert len(server.post(COMPLETE, **asked, best_of=2).json()["choices"]) == 2
    error = server.post(COMPLETE, **asked, best_of=3).json()["error"]
    assert error["param"] == "best_of" and "as many as n" in error["message"]


def test_tokens_of_a_response_are_counted(server: Running) -> None:
    openai = pytest.importorskip("openai")
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}}
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        words = {"model": "tiny", "input": "How many?", "instructions": "Be brief", "tools": [tool]}
        counted = client.responses.input_tokens.count(**words)
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == client.responses.create(**words, max_output_tokens=1).usage.input_tokens > 20
        with pytest.raises(openai.BadRequestError, match="keeps nothing"):
            client.responses.input_tokens.count(**words, previous_response_id="resp_1")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/embeddings", "no embeddings"),
        ("/api/embed", "no embeddings"),
        ("/v1/rerank", "no ranks"),
        ("/v1/files", "/openapi.json"),
        ("/v1/messages/batches", "/openapi.json"),
    ],
)
def test_what_is_not_here_says_what_is(server: Running, path: str, words: str) -> None:
    reply = server.post(path, model="tiny", input="a")
    assert reply.status_code == 404 and words in reply.text


def test_a_model_that_calls_no_tools_says_what_would_have_it() -> None:
    with running(Model("Well").llm) as server:
        reply = server.post(CHAT, **json.loads(MISTRAL))
        assert reply.status_code == 400 and "--tool-parser" in reply.json()["error"]["message"]
