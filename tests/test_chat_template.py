"""What a caller says reaches the chat template: parts, tool calls, tools, documents, variables of the template."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dummy_engine import DummyEngine
from dummy_tokenizer import BYTES, SPECIAL, byte_level

from hybrid import LLM, AsyncLLM, SamplingParams
from hybrid.errors import RequestError
from hybrid.text.chat_template import ChatTemplate, load_template
from hybrid.text.tokenizer import Tokenizer
from hybrid.weights.companions import copy_companions

USER = {"role": "user", "content": "hi"}
EVERYTHING = ChatTemplate(
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls|tojson if m.tool_calls }};{% endfor %}"
    "{{ tools|tojson if tools }}{{ documents|tojson if documents }}"
    "{% if thinking is not defined or thinking %}<think>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_all_arguments_reach_the_template_from_every_entrance() -> None:
    tool, document = {"type": "function", "function": {"name": "add"}}, {"title": "t", "text": "x"}
    more: dict[str, Any] = {"tools": [tool], "documents": [document], "template_kwargs": {"thinking": False}}
    messages = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}]
    text = f"user:hi;assistant:{json.dumps([CALL])};tool:1;{json.dumps([tool])}{json.dumps([document])}"
    assert EVERYTHING.render(messages, **more) == text
    two = SamplingParams(max_tokens=2)
    with LLM.from_engine(
        DummyEngine(max_seq_len=400, kv_token_budget=800), BYTES, frozenset([SPECIAL]), EVERYTHING
    ) as llm:
        assert llm.encode_chat(messages, **more) == [*text.encode()]
        answer = llm.chat(messages, two, **more)
        assert answer.prompt_token_ids == [*text.encode()]
        assert "".join(delta.text for delta in llm.stream_chat(messages, two, **more)) == answer.text

        async def scenario(both: AsyncLLM) -> None:
            assert both.encode_chat(messages, **more) == [*text.encode()]
            assert await both.chat(messages, two, **more) == answer
            assert "".join([delta.text async for delta in both.stream_chat(messages, two, **more)]) == answer.text

        asyncio.run(scenario(AsyncLLM(llm)))


def test_parts_go_to_templates_that_read_them_and_as_lines_to_others() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    reads = "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}"
    assert ChatTemplate(reads).render(parts) == "[a][b]"
    assert ChatTemplate("{{ messages[0].content }}").render(parts) == "a\nb"


def test_reasoning_has_all_of_its_names_and_none_is_absent() -> None:
    shown = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}|{{ messages[0].content is defined }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": None, name: "why"}
        assert ChatTemplate(shown).render([message]) == "why|why|False"


def test_a_second_template_is_for_requests_with_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_template(tmp_path)
    assert template is not None
    assert template.render([USER]) == "plain" and template.render([USER], tools=[{"name": "add"}]) == "add"


def test_files_of_templates_count_more_than_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "configured"}))
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    template = load_template(tmp_path)
    assert template is not None
    assert template.render([USER]) == "file" and template.render([USER], tools=[]) == "tools"
    output = tmp_path / "store"
    output.mkdir()
    copy_companions(tmp_path, output, pytest.fail)
    assert load_template(output) == template


def test_variables_of_the_caller_beat_those_of_the_model() -> None:
    template = ChatTemplate("{{ bos_token }}{{ add_generation_prompt }}", {"bos_token": "<s>"})
    assert template.render([USER]) == "<s>True"
    assert template.render([USER], template_kwargs={"bos_token": "", "add_generation_prompt": False}) == "False"


def test_objects_reach_a_template_as_plain_data() -> None:
    @dataclass
    class Said:
        role: str
        content: str

    class Kind(StrEnum):
        A = "a"

    shown = ChatTemplate("{{ messages[0].content }} {{ n }} {{ kind }} {{ odd }}")
    given = {"n": np.int64(3), "kind": Kind.A, "odd": object()}
    assert shown.render([Said("user", "hi")], template_kwargs=given) == "hi 3 a <object>"  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("messages", "more", "said"),
    [
        ([{"role": "assistant"}], {}, "says nothing"),
        ([{"role": "user", "content": 5}], {}, "must be a text or a list of parts"),
        ([{"role": "user", "content": ["a"]}], {}, "a part of a content must be like"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, "reads text alone"),
        ([USER], {"tools": "add"}, "tools must be a list of objects"),
        ([USER], {"tools": [print]}, "tools must be a list of objects"),
        ([USER], {"documents": {"title": "x"}}, "documents must be a list of objects"),
        ([USER], {"template_kwargs": [1]}, "template_kwargs must be an object"),
        ([USER], {"template_kwargs": {"tools": []}}, "an argument of its own"),
    ],
)
def test_what_is_no_message_or_no_option_is_refused(messages: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        EVERYTHING.render(messages, **more)
    assert "\n" not in str(error.value)


def test_a_message_that_holds_itself_is_refused() -> None:
    message: dict[str, Any] = {"role": "user", "content": "x"}
    message["tool_calls"] = [message]
    with pytest.raises(RequestError, match="nested too deeply"):
        EVERYTHING.render([message])


def test_a_chat_ends_at_the_end_of_the_tokenizer_too() -> None:
    """A fine-tune may have changed the tokenizer alone; a raw prompt ends where generation_config.json says."""
    engine = DummyEngine(next_token=lambda tokens: SPECIAL if len(tokens) == 12 else ord("x"))
    with LLM.from_engine(engine, Tokenizer(byte_level(), eos_id=SPECIAL), frozenset([257]), EVERYTHING) as llm:
        many = SamplingParams(max_tokens=20)
        assert llm.chat([USER], many, template_kwargs={"thinking": False}).finish_reason == "stop"
        assert llm.generate("user:hi;", many)[0].finish_reason == "length"


def test_roles_that_only_some_templates_know() -> None:
    message = {"role": "ipython", "content": "1"}
    assert ChatTemplate("{{ messages[0].role == 'ipython' }}").render([message]) == "True"
    with pytest.raises(RequestError, match="allowed"):
        ChatTemplate("{{ messages[0].role }}").render([message])


RESULT = {"role": "tool", "content": "1"}
WRITES_CALLS = "{% for c in m.tool_calls or () %}[{{ c.function.name }}]{% endfor %}"
EACH = "{% for m in messages %}"
# How published templates read a message that calls tools and says nothing, told by what they do with its content.
BY_NULL = (  # as DeepSeek-R1's: calls are written only beside a null
    EACH + "{% if m['content'] is none %}" + WRITES_CALLS + "{% else %}{{ '=' + m['content'] }}{% endif %}{% endfor %}"
)
BY_TRUTH = EACH + "{% if m.content %}{{ '=' + m.content }}{% endif %}" + WRITES_CALLS + "{% endfor %}"
TEXTS_ALONE = EACH + "{{ '=' + m['content'] }}" + WRITES_CALLS + "{% endfor %}"
PRINTS = EACH + "={{ m['content'] }}" + WRITES_CALLS + "{% endfor %}"
LEFT_OUT = (
    EACH + "{% if 'content' not in m %}" + WRITES_CALLS + "{% else %}{{ '=' + m['content'] }}{% endif %}{% endfor %}"
)
KNOWS_NO_CALLS = EACH + "{{ '=' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize("given", [{"content": None}, {"content": ""}, {}], ids=["null", "empty", "left out"])
@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        (BY_NULL, "=hi[add]=1"),
        (BY_TRUTH, "=hi[add]=1"),
        (TEXTS_ALONE, "=hi=[add]=1"),
        (PRINTS, "=hi=[add]=1"),
        (LEFT_OUT, "=hi[add]=1"),
        (KNOWS_NO_CALLS, "=hi==1"),
        ("{{ raise_exception('no') if messages[1:] }}=hi", None),
    ],
    ids=["by null", "by truth", "texts alone", "prints", "left out", "knows no calls", "refuses"],
)
def test_a_call_without_a_text_is_read_by_every_template(
    source: str, prompt: str | None, given: dict[str, Any]
) -> None:
    messages = [USER, {"role": "assistant", "tool_calls": [CALL], **given}, RESULT]
    if prompt is None:
        with pytest.raises(RequestError, match="refuses these messages: no"):
            ChatTemplate(source).render(messages)
    else:
        assert ChatTemplate(source).render(messages) == prompt


@pytest.mark.parametrize("given", [{"content": None}, {"content": ""}, {}], ids=["null", "empty", "left out"])
def test_a_template_that_reads_a_call_either_way_gets_it_as_transformers_gives_it(given: dict[str, Any]) -> None:
    kind = "{{ 'left out' if m.content is not defined else 'null' if m.content is none else 'a text' }}"
    source = EACH + kind + WRITES_CALLS + "{% endfor %}"
    messages = [USER, {"role": "assistant", "tool_calls": [CALL], **given}, RESULT]
    templates = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = templates.render_jinja_template([messages], chat_template=source)
    assert ChatTemplate(source).render(messages) == expected
