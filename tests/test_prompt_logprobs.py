"""How likely the tokens of a prompt are, in replies."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import numpy as np  # noqa: E402
from server_rig import QUESTION  # noqa: E402


def test_completions_tell_those_of_each_prompt(server) -> None:
    llm, prompts = server.service.llm.llm, ["Once upon a time", "The dog"]
    choices = server.post("/v1/completions", prompt=prompts, n=2, max_tokens=1, prompt_logprobs=2).json()["choices"]
    assert len(choices) == 4
    for choice, prompt in zip(choices, (prompts[0], prompts[0], *prompts[1:], prompts[1]), strict=True):
        first, *others = choice["prompt_logprobs"]
        tokens, logits = llm.encode(prompt), llm.logits(llm.encode(prompt))
        assert first is None and len(others) == len(tokens) - 1
        for told, row, token in zip(others, logits, tokens[1:], strict=False):
            order = np.argsort(-row, kind="stable")
            assert {int(name) for name in told} == {*order[:2].tolist(), token}
            assert told[str(token)]["rank"] == 1 + int((row > row[token]).sum())
            assert told[str(order[0])]["rank"] == 1
            assert told[str(token)]["decoded_token"] == server.service.token_texts.text_of(token)
    assert "prompt_logprobs" not in server.post("/v1/completions", prompt="A", max_tokens=1).json()["choices"][0]


def test_chats_tell_them_and_streams_do_not(server) -> None:
    body = {"messages": QUESTION, "max_tokens": 1, "prompt_logprobs": 0}
    reply = server.post("/v1/chat/completions", **body).json()
    assert len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]
    assert all(len(told) == 1 for told in reply["prompt_logprobs"][1:])
    for wrong in ({"stream": True}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1}):
        assert server.post("/v1/chat/completions", **{**body, **wrong}).status_code == 400
