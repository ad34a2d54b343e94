"""Probabilities of the tokens of a response's text, as the package `openai` asks for them and reads them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from dummy_tokenizer import BYTES  # noqa: E402
from scripted_model import Model  # noqa: E402
from server_rig import Running, running  # noqa: E402
from test_server_tools import SHELL, SOURCE, call  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.core import TokenLogprob, ToolCall  # noqa: E402
from hybrid.server.parts import Part  # noqa: E402
from hybrid.server.text_logprobs import TextLogprobs  # noqa: E402
from hybrid.text.chat_template import ChatTemplate  # noqa: E402
from hybrid.text.token_texts import TokenTexts  # noqa: E402

THOUGHT, SAID = "t Hä? think", "thät  is\n\nso"
INCLUDE = "message.output_text.logprobs"
PROMPT: dict[str, Any] = {"model": "tiny", "input": "Go", "temperature": 0}


@pytest.fixture(scope="module")
def server():
    answer = f"<think>{THOUGHT}</think>\n\n{SAID} {call('shell', a='thät')}"
    with running(Model(answer, template=ChatTemplate(SOURCE), max_seq_len=900).llm) as server:
        yield server


@pytest.fixture
def client(server: Running):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        yield client


def written(entries: list[Any]) -> str:
    return b"".join(bytes(entry.bytes) for entry in entries).decode()


@pytest.mark.parametrize(
    "more", [{"include": [INCLUDE]}, {"top_logprobs": 3}, {"include": [INCLUDE], "top_logprobs": 3}]
)
def test_tokens_of_the_text_alone_have_them_whole_and_streamed(client, more: dict[str, Any]) -> None:
    asked, count = {**PROMPT, "tools": [SHELL], **more}, more.get("top_logprobs", 0)
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    parts = [reply.output[1].content[0] for reply in (whole, streamed)]
    for part in parts:
        assert part.text == SAID and written(part.logprobs) == SAID
        assert all(entry.logprob <= 0 and len(entry.top_logprobs) == count for entry in part.logprobs)
    assert parts[0].logprobs == parts[1].logprobs
    assert whole.top_logprobs == count
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert sum((event.logprobs for event in deltas), []) != []
    assert [entry.token for event in deltas for entry in event.logprobs] == [e.token for e in parts[0].logprobs]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert [entry.logprob for entry in done.logprobs] == [entry.logprob for entry in parts[0].logprobs]


def test_who_asks_for_none_gets_none_and_bounds_are_told(client) -> None:
    assert client.responses.create(**PROMPT).output[1].content[0].logprobs == []
    assert client.responses.create(**PROMPT, top_logprobs=0).output[1].content[0].logprobs == []
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        client.responses.create(**PROMPT, top_logprobs=21)


def test_they_are_those_of_the_chat() -> None:
    words = {"model": "tiny", "temperature": 0}
    question = [{"role": "user", "content": "Tell me a story."}]
    with (
        running(LLM()) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client,
    ):
        chat = client.chat.completions.create(
            **words, messages=question, max_tokens=12, logprobs=True, top_logprobs=2
        ).choices[0]
        reply = client.responses.create(**words, input=question, max_output_tokens=12, top_logprobs=2)
    (part,) = reply.output[0].content
    assert part.text == chat.message.content
    expected = [(one.token, one.logprob, [top.token for top in one.top_logprobs]) for one in chat.logprobs.content]
    told = [(one.token, one.logprob, [top.token for top in one.top_logprobs]) for one in part.logprobs]
    assert told == expected


def found(*steps: str | Part, whole: bool = False) -> list[str]:
    """The texts of the tokens of each part; a text comes as its bytes."""
    finder, told = TextLogprobs(TokenTexts(BYTES), whole), []
    for step in steps:
        if isinstance(step, str):
            finder.push([TokenLogprob(token, -1.0) for token in BYTES.encode(step)])
        else:
            told.append(b"".join(bytes(entry["bytes"]) for entry in finder.take(step)).decode())
    return told


def test_parts_are_found_among_marks_and_what_is_held_back() -> None:
    assert found("<think>t", Part("reasoning", "t"), "</think>i", Part("text", "i"), "s", Part("text", "s")) == [
        "t", "i", "s",
    ]  # fmt: skip
    assert found("ab a", Part("text", "ab"), Part("text", " a")) == ["ab", " a"]
    assert found("a\n", Part("text", "a"), "b", Part("text", "\n\nb")) == ["a", "b"]
    assert found("ab", Part("text", "\ufffd"), "c", Part("text", "c")) == ["ab", "c"]
    called = Part("call", "{}", ToolCall("a", "{}", "1"))
    assert found("a{}b", Part("text", "a"), called, Part("text", "b")) == ["a", "{}", "b"]
    assert found(Part("text", "a")) == [""]


def test_a_part_of_a_whole_reply_is_not_found_in_those_behind_it() -> None:
    called = Part("call", '{"x":"Hi"}', ToolCall("a", '{"x":"Hi"}', "1"))
    told = found('Hi<tool_call>{"x":"Hi"}', Part("text", "Hi"), called, whole=True)
    assert told == ["Hi", '{"x":"Hi"}']
    assert found("<think>Hi</think>\n\nHi", Part("reasoning", "Hi"), Part("text", "Hi"), whole=True) == ["Hi", "Hi"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_was_thought_before_has_its_probabilities(stream: bool) -> None:
    model = Model("<think>Hi</think>\n\nHi", template=ChatTemplate(SOURCE), max_seq_len=900)
    with (
        running(model.llm) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client,
    ):
        asked = {**PROMPT, "include": [INCLUDE]}
        if stream:
            with client.responses.stream(**asked) as events:
                events.until_done()
                reply = events.get_final_response()
        else:
            reply = client.responses.create(**asked)
    thought, said = reply.output
    assert (thought.type, written(said.content[0].logprobs)) == ("reasoning", "Hi")
