"""The packages `anthropic` and `ollama`, and OpenAI's for responses, unchanged against the server."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from scripted_model import Model  # noqa: E402
from server_rig import running  # noqa: E402

from hybrid import LLM  # noqa: E402
from hybrid.text.chat_template import ChatTemplate  # noqa: E402

SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}}
ROME = {"place": "Rome"}
ASKED = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(scope="module")
def server():
    template = ChatTemplate(
        "{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% endfor %}.{# <think> <tool_call> #}"
    )
    call = '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'
    with running(Model(f"<think>Hm</think>I look{call}", template=template, max_seq_len=900).llm) as server:
        yield server


def test_the_client_of_anthropic(server) -> None:
    anthropic = pytest.importorskip("anthropic")
    words = {"model": "tiny", "max_tokens": 200, "messages": ASKED, "extra_body": {"temperature": 0}}
    words["tools"] = [{"name": "weather", "input_schema": SCHEMA}]
    with anthropic.Anthropic(base_url=server.address, api_key="any", max_retries=0) as client:
        whole = client.messages.create(**words)
        with client.messages.stream(**words) as stream:
            said = "".join(stream.text_stream)
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
            assert (message.content[2].input, message.stop_reason) == (ROME, "tool_use")
        assert said == "I look" and streamed.usage.output_tokens == whole.usage.output_tokens
        counted = client.messages.count_tokens(model="tiny", messages=ASKED).input_tokens
        usage = client.messages.create(model="tiny", max_tokens=1, messages=ASKED).usage
        assert counted == usage.input_tokens + usage.cache_read_input_tokens
        with pytest.raises(anthropic.NotFoundError, match="tiny, also-tiny"):
            client.messages.create(model="x", max_tokens=1, messages=ASKED)


def test_the_client_of_ollama(server) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=server.address)
    words = {"model": "tiny", "messages": ASKED, "options": {"temperature": 0}, "think": True}
    words["tools"] = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
    whole = client.chat(**words).message
    assert (whole.content, whole.thinking, whole.tool_calls[0].function.arguments) == ("I look", "Hm", ROME)
    chunks = list(client.chat(**words, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == "I look" and chunks[-1].done
    assert client.chat(model="tiny", messages=[*ASKED, whole, {"role": "tool", "content": "Wet"}]).done
    assert client.generate(model="tiny", prompt="Rain?", options={"temperature": 0}).response.startswith("I look")
    with pytest.raises(ollama.ResponseError, match="tiny, also-tiny"):
        client.generate(model="x", prompt="a")


@pytest.mark.parametrize("options", [{}, {"raw": True}, None], ids=["generate", "raw", "chat"])
def test_the_client_of_ollama_gets_the_probabilities_of_all_tokens(server, options) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=server.address)
    words = {"model": "tiny", "options": {"temperature": 0}, "logprobs": True, "top_logprobs": 2}
    ask, given = (client.chat, {"messages": ASKED}) if options is None else (client.generate, {"prompt": "Rain?"})
    whole = ask(**words, **given, **(options or {}))
    chunks = list(ask(**words, **given, **(options or {}), stream=True))
    told = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    assert told == list(whole.logprobs) and len(told) == whole.eval_count
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in told)
    assert options or sum(bool(chunk.logprobs) for chunk in chunks) > 2, "they come with their text"
    assert ask(model="tiny", options={"num_predict": 1}, **given).logprobs is None
    with pytest.raises(ollama.ResponseError, match="top_logprobs needs logprobs"):
        ask(model="tiny", top_logprobs=2, **given)
    with pytest.raises(ollama.ResponseError, match="top_logprobs"):
        ask(model="tiny", logprobs=True, top_logprobs=21, **given)


@pytest.mark.parametrize("think", [True, False, "none", "minimal", "low", "medium", "high", "xhigh", "max"])
def test_every_way_to_ask_ollama_for_thinking_is_taken(server, think) -> None:
    ollama = pytest.importorskip("ollama")
    assert ollama.Client(host=server.address).chat(model="tiny", messages=ASKED, think=think).done


def test_ollama_is_told_what_there_is() -> None:
    ollama = pytest.importorskip("ollama")
    with running(LLM()) as server:
        client, length = ollama.Client(host=server.address), server.service.llm.llm.max_tokens
        first = client.list().models[0]
        assert first.model == "tiny" and first.size > 1000 and first.details.family
        assert client.ps().models[0].context_length == length
        shown = client.show("tiny:latest")
        assert shown.modelinfo[f"{first.details.family}.context_length"] == length
        assert shown.capabilities[0] == "completion"


def test_responses_of_the_client_of_openai(server) -> None:
    openai = pytest.importorskip("openai")
    words = {"model": "tiny", "input": "Rain?", "temperature": 0}
    words["tools"] = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}]
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
        whole = client.responses.create(**words)
        assert whole.output_text == "I look" and whole.output[2].name == "weather"
        with client.responses.stream(**words) as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_text == "I look"
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        result = {"type": "function_call_output", "call_id": whole.output[2].call_id, "output": "Wet"}
        again = client.responses.create(model="tiny", input=[*ASKED, *whole.output, result], temperature=0)
        assert again.status == "completed"
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(model="tiny", input="a", previous_response_id="resp_1")
