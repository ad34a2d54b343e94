"""The server as clients of OpenAI's API see it: the package `openai`, and plain HTTP where it says more."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

from dummy_tokenizer import BYTES, SPECIAL  # noqa: E402
from scripted_model import TEMPLATE, Model  # noqa: E402
from server_rig import QUESTION, Running, running  # noqa: E402

from hybrid import SamplingParams  # noqa: E402
from hybrid.text.chat_template import ChatTemplate  # noqa: E402
from hybrid.text.token_texts import TokenTexts  # noqa: E402

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}},
}


def alone(server: Running, text: str, count: int) -> str:
    """What the model itself says."""
    return server.service.llm.llm.generate(text, SamplingParams(max_tokens=count))[0].text


def test_a_chat_is_what_the_library_answers(server, client) -> None:
    reply = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_completion_tokens=12)
    expected = server.service.llm.llm.chat(QUESTION, SamplingParams(max_tokens=12))
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "length")
    assert reply.usage.completion_tokens == 12 and reply.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert reply.timings["predicted_n"] == 12 and reply.expert_cache is None and reply.id.startswith("chatcmpl-")


def test_a_stream_has_role_text_reason_usage_and_an_end(server, client) -> None:
    words = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**words)
    chunks = list(client.chat.completions.create(**words, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12 and chunks[-2].usage is None
    events = server.events("/v1/chat/completions", **words)
    assert events[-1] == "[DONE]" and events[-2]["timings"]["predicted_n"] == 12 and "usage" not in events[-2]


def test_a_conversation_that_goes_on_reads_only_what_is_new(client) -> None:
    messages = [{"role": "user", "content": "Tell me of a bear and a bee."}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And?"},
    ]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert second.usage.prompt_tokens_details.cached_tokens > 10


def test_strangers_and_samples_share_what_their_prompts_begin_with(client) -> None:
    system = {
        "role": "system",
        "content": "Speak of bears, bees, foxes and owls, in words that a child understands. " * 4,
    }
    for question, count in (("Who are you?", 1), ("Where do you live?", 3)):
        messages = [system, {"role": "user", "content": question}]
        reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, n=count)
    assert reply.usage.prompt_tokens_details.cached_tokens >= reply.usage.prompt_tokens // 2


def test_sampling_is_repeatable_and_its_parameters_count(client) -> None:
    def said(**words):
        words = {"model": "tiny", "messages": QUESTION, "max_tokens": 10, **words}
        return [choice.message.content for choice in client.chat.completions.create(**words).choices]

    first, second = said(seed=7, n=2, temperature=1.5)
    assert first != second and said(seed=7, n=2, temperature=1.5) == [first, second]
    (plain,) = said(temperature=0)
    assert said(extra_body={"top_k": 1}) == [plain] and said(top_p=1e-6) == [plain] == said(extra_body={"min_p": 1.0})
    word = plain.split()[1]
    assert said(temperature=0, stop=[word])[0] == plain.split(word)[0]
    assert said(temperature=0, logit_bias={"0": -100, "5": 100})[0] != plain


def test_logprobs_are_those_of_the_library(server, client) -> None:
    words = {"model": "tiny", "messages": QUESTION, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**words, logprobs=True, top_logprobs=3)
    expected = server.service.llm.llm.chat(QUESTION, SamplingParams(max_tokens=6, logprobs=3))
    content = whole.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx([token.logprob for token in expected.logprobs])
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token for entry in content)
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == expected.text
    chunks = client.chat.completions.create(**words, logprobs=True, top_logprobs=3, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry for part in streamed if part for entry in part.content] == content


def test_echo_and_logprobs_score_a_prompt(server, client) -> None:
    llm = server.service.llm.llm
    tokens = llm.encode("Once upon a time there was a fox")
    other = tokens[:3]
    reply = client.completions.create(
        model="tiny", prompt=[tokens, other], echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    for choice, prompt in zip(reply.choices, (tokens, other), strict=True):
        scores = llm.score(prompt)
        assert choice.logprobs.token_logprobs[0] is None and len(choice.logprobs.tokens) == len(prompt) + 1
        told = choice.logprobs.token_logprobs[1 : len(prompt)]
        assert told == pytest.approx([score.logprob for score in scores[1:]])
        assert "".join(choice.logprobs.tokens) == choice.text and len(choice.logprobs.top_logprobs[1]) in (2, 3)
        places = [choice.text[at : at + len(text)] for at, text in zip(*offsets(choice), strict=True)]
        assert places == choice.logprobs.tokens
    none = client.completions.create(model="tiny", prompt=tokens, echo=True, logprobs=0, max_tokens=0)
    assert none.choices[0].text == "Once upon a time there was a fox" and none.usage.completion_tokens == 0
    (first, *_, last) = server.events("/v1/completions", prompt="Once", echo=True, logprobs=1, max_tokens=1)[:-1]
    assert first["choices"][0]["text"] == "Once" and first["choices"][0]["logprobs"]["token_logprobs"] == [None]
    assert last["choices"][0]["finish_reason"] == "length"


def offsets(choice):
    return choice.logprobs.text_offset, choice.logprobs.tokens


def test_completions_of_several_prompts_keep_their_order(server, client) -> None:
    prompts = ["Once upon a time", "The big dog"]
    reply = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=5, temperature=0)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    expected = [alone(server, prompt, 5) for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in reply.choices] == expected
    chunks = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, temperature=0, stream=True)
    said = {0: "", 1: ""}
    for chunk in chunks:
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert [*said.values()] == expected[::2]


def test_sixty_four_streams_at_once_say_what_each_says_alone(server) -> None:
    prompts = [f"Once upon a time there were {number} foxes and" for number in range(64)]
    expected = [alone(server, prompt, 8) for prompt in prompts]

    async def stream(client, prompt: str) -> str:
        chunks = await client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client:
            return list(await asyncio.gather(*(stream(client, prompt) for prompt in prompts)))

    assert asyncio.run(all_of_them()) == expected
    assert server.idle


def test_models_texts_and_templates(server, client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "also-tiny"]
    assert client.models.retrieve("also-tiny").max_model_len == server.service.llm.llm.max_tokens
    with pytest.raises(openai.NotFoundError, match="tiny, also-tiny"):
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    tokens = server.post("/tokenize", content="Hello fox").json()["tokens"]
    assert tokens == server.service.llm.llm.encode("Hello fox")
    assert server.post("/detokenize", tokens=tokens).json()["content"] == "Hello fox"
    pieces = server.post("/tokenize", prompt="Hello fox", with_pieces=True).json()["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == "Hello fox"
    prompt = server.post("/apply-template", messages=QUESTION).json()["prompt"]
    assert server.service.llm.llm.encode(prompt, False) == server.service.llm.llm.encode_chat(QUESTION)
    info = server.http.get("/info").json()
    assert info["limits"]["n"] == 8 and info["models"] == ["tiny", "also-tiny"]
    assert server.http.get("/health").json()["status"] == "ok"
    metrics = server.http.get("/metrics").text
    assert "hybrid_generation_tokens_total" in metrics and "hybrid_requests_running 0.0" in metrics
    assert "/v1/chat/completions" in server.http.get("/openapi.json").json()["paths"]


def scripted(answer: str) -> Model:
    return Model(answer, template=ChatTemplate(TEMPLATE.source + "{# <think> <tool_call> #}"))


def test_calls_of_tools_and_reasoning_are_apart_whole_and_streamed() -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'
    model = scripted(f"<think>Hm</think>I look{call}{call}")
    words = {"model": "tiny", "messages": [{"role": "user", "content": "Rain?"}], "tools": [WEATHER], "temperature": 0}
    with running(model.llm) as server, openai.OpenAI(base_url=f"{server.address}/v1", api_key="any") as client:
        (choice,) = client.chat.completions.create(**words).choices
        assert (choice.message.content, choice.message.reasoning_content) == ("I look", "Hm")
        assert [call.function.name for call in choice.message.tool_calls] == ["weather", "weather"]
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"place": "Rome"}
        assert choice.finish_reason == "tool_calls"
        deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**words, stream=True)]
        calls = [call for delta in deltas for call in delta.delta.tool_calls or ()]
        assert [call.index for call in calls] == [0, 1] and calls[0].function.arguments == '{"place": "Rome"}'
        assert deltas[-1].finish_reason == "tool_calls"
        assert "".join(getattr(delta.delta, "reasoning_content", None) or "" for delta in deltas) == "Hm"
        one = client.chat.completions.create(**words, parallel_tool_calls=False).choices[0]
        assert len(one.message.tool_calls) == 1
        with client.chat.completions.stream(**words) as stream:
            assert len(stream.get_final_completion().choices[0].message.tool_calls) == 2
        client.chat.completions.create(**words, tool_choice="none")
        assert not model.prompts[-1].startswith("1") and model.prompts[0].startswith("1")
        with pytest.raises(openai.BadRequestError, match="'required'"):
            client.chat.completions.create(**words, tool_choice="always")


def test_variables_of_the_template_are_those_of_a_list() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ reasoning_effort }}{{ messages[0].content }}.")
    model = Model("Well", template=template)
    with running(model.llm) as server:
        ask = {"messages": QUESTION}
        more = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
        assert server.post("/apply-template", **ask, **more).json()["prompt"].startswith("Falselow")
        refused = server.post("/v1/chat/completions", **ask, chat_template_kwargs={"messages": "x"})
        assert refused.status_code == 400 and "enable_thinking" in refused.json()["error"]["message"]


def test_tokens_are_told_as_bytes_where_they_are_no_characters() -> None:
    texts = TokenTexts(BYTES)
    assert [texts.text_of(token) for token in (65, 0xE4, SPECIAL)] == ["A", "bytes:\\xe4", "<end>"]
    assert texts.bytes_of(257) == b"\xe4\xbd" and texts.bytes_of(99999) == b""


def test_none_takes_what_looks_like_a_call_for_a_text() -> None:
    call = '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'
    model = scripted(call)
    with running(model.llm) as server:
        for choice, said in (("auto", None), ("none", call)):
            body = {"messages": QUESTION, "tools": [WEATHER], "tool_choice": choice, "temperature": 0}
            (reply,) = server.post("/v1/chat/completions", **body).json()["choices"]
            assert reply["message"]["content"] == said and ("tool_calls" in reply["message"]) == (said is None)
