"""Conversations of agents in which the system speaks late, or a developer, for chat templates that take neither."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from scripted_model import Model  # noqa: E402
from server_rig import running  # noqa: E402

from hybrid.text.chat_template import ChatTemplate  # noqa: E402

EVERYTHING = "{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% endfor %}."
STRICT = (  # as those of Qwen3.5: the system speaks first or not at all, and no other role is known
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('first') }}{% endif %}"
    "{% if m.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('role') }}{% endif %}"
    "({{ m.role[0] }}){{ m.content }}{% endfor %}."
)
SILENT = (  # as gpt-oss's: what the system says later is left out without a word
    "{% for m in messages %}{% if m.role in ('user', 'assistant', 'tool') or loop.first %}"
    "({{ m.role[0] }}){{ m.content }}{% endif %}{% endfor %}."
)
USER, LATE = {"role": "user", "content": "Go"}, {"role": "system", "content": "Agents: x"}
SAID = {"role": "assistant", "content": "Gone"}
DEVELOPER = {"role": "developer", "content": "Be kind"}


def prompts_of(template: str, path: str, bodies: list[dict[str, Any]]) -> list[str]:
    model = Model("Well", template=ChatTemplate(template))
    with running(model.llm) as server:
        for body in bodies:
            reply = server.post(path, **body)
            assert reply.status_code == 200, reply.text
    return model.prompts


@pytest.mark.parametrize(
    ("template", "late"),
    [(EVERYTHING, "(s)Agents: x"), (STRICT, "\n\nAgents: x"), (SILENT, "\n\nAgents: x")],
    ids=["everything", "strict", "silent"],
)
def test_what_the_system_says_later_reaches_the_prompt_where_it_stands(template: str, late: str) -> None:
    conversation = [USER, LATE, SAID, {"role": "user", "content": [{"type": "text", "text": "On"}]}, LATE]
    messages = {"max_tokens": 1, "system": "Be brief", "messages": conversation}
    assert prompts_of(template, "/v1/messages", [messages]) == [f"(s)Be brief(u)Go{late}(a)Gone(u)On{late}."]
    chat = {"max_tokens": 1, "messages": [{"role": "system", "content": "Be brief"}, *conversation[:3], USER]}
    assert prompts_of(template, "/v1/chat/completions", [chat]) == [f"(s)Be brief(u)Go{late}(a)Gone(u)Go."]


@pytest.mark.parametrize("template", [EVERYTHING, STRICT, SILENT], ids=["everything", "strict", "silent"])
def test_what_a_developer_says_is_the_system_s_where_none_is_known(template: str) -> None:
    chat = {"max_tokens": 1, "messages": [DEVELOPER, USER]}
    letter = "s" if template == STRICT else "d"
    assert prompts_of(template, "/v1/chat/completions", [chat]) == [f"({letter})Be kind(u)Go."]
    later = {"input": [USER, DEVELOPER], "instructions": "Be brief", "max_output_tokens": 1}
    late = "(s)Be kind" if template == EVERYTHING else "\n\nBe kind"
    assert prompts_of(template, "/v1/responses", [later]) == [f"(s)Be brief(u)Go{late}."]


def test_tokens_are_counted_and_templates_applied_of_the_same_messages() -> None:
    model = Model("Well", template=ChatTemplate(STRICT))
    with running(model.llm) as server:
        prompt = server.post("/apply-template", messages=[USER, LATE]).json()["prompt"]
        assert prompt == "(u)Go\n\nAgents: x."
        counted = server.post("/v1/messages/count_tokens", model="tiny", messages=[USER, LATE]).json()
        assert counted == {"input_tokens": len(prompt)}


def test_texts_of_documents_and_of_searches_are_read() -> None:
    held = [
        {"type": "document", "title": "A", "source": {"type": "text", "media_type": "text/plain", "data": "b"}},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "c"}]}},
        {"type": "search_result", "title": "D", "source": "https://e", "content": [{"type": "text", "text": "f"}]},
    ]
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_reference", "tool_name": "g"}]}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "w", "input": {}}]}
    messages = [{"role": "user", "content": held}, use, {"role": "user", "content": [result]}]
    asked = {"max_tokens": 1, "messages": messages, "diagnostics": {}, "fallbacks": [], "top_k": -1}
    (prompt,) = prompts_of(EVERYTHING, "/v1/messages", [asked])
    assert prompt == "(u)A\nb\nc\nD\nhttps://e\nf(a)(t)Tool: g."
