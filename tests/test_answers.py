"""Reasoning and calls of tools in answers: told apart, however the answer is split, and never half a mark."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dummy_tokenizer import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import ConfigError
from hybrid.text.answer import AnswerStream
from hybrid.text.answer_format import DIALECTS, REASONING_MARKS, AnswerFormat, choose_format
from hybrid.text.detokenizer import TextStream
from hybrid.text.parts import Parts
from hybrid.text.tokenizer import Tokenizer

WEATHER = {"city": 'Pa "ris" <b>\n x', "days": 3, "o": {"a": [1, "x"]}}
ARGUMENTS = json.dumps(WEATHER)
NAMED = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}, "o": {"type": "object"}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": PROPERTIES}}}]
DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>%s<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
GLM = "".join(
    f"<arg_key>{key}</arg_key>\n<arg_value>{value if isinstance(value, str) else json.dumps(value)}</arg_value>\n"
    for key, value in WEATHER.items()
)
XML = "".join(
    f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
    for key, value in WEATHER.items()
)
VALUES = {key: value if isinstance(value, str) else json.dumps(value) for key, value in WEATHER.items()}
INVOKE = (
    '<invoke name="weather">'
    + "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in VALUES.items())
    + "</invoke>"
)
DSML = INVOKE.replace("<", "<｜DSML｜").replace("<｜DSML｜/", "</｜DSML｜").replace("<｜DSML｜b>", "<b>")
M3 = "]<]minimax[>["
M3_CALL = (
    f'{M3}<invoke name="weather">{M3}<city>{WEATHER["city"]}{M3}</city>{M3}<days>3{M3}</days>'
    f"{M3}<o>{M3}<a>{M3}<item>1{M3}</item>{M3}<item>x{M3}</item>{M3}</a>{M3}</o>{M3}</invoke>"
)
CALLS = {  # an answer that calls a tool once, in every dialect
    "hermes": f"<tool_call>\n{NAMED}\n</tool_call>",
    "qwen3_coder": f"<tool_call>\n<function=weather>\n{XML}</function>\n</tool_call>",
    "glm4": f"<tool_call>weather\n{GLM}</tool_call>",
    "hy_v3": f"<tool_calls><tool_call>weather<tool_sep>\n{GLM}</tool_call>\n</tool_calls>".replace(
        ">", ":opensource>"
    ).replace("<b:opensource>", "<b>"),
    "deepseek": DEEPSEEK % f"function<｜tool▁sep｜>weather\n```json\n{ARGUMENTS}\n```",
    "minimax": f"<minimax:tool_call>\n{INVOKE}\n</minimax:tool_call>",
    "minimax_m3": f"{M3}<tool_call>\n{M3_CALL}\n{M3}</tool_call>",
    "dsml": f"<｜DSML｜function_calls>\n{DSML}\n</｜DSML｜function_calls>",
    "kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
    "mistral": f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{ARGUMENTS}",
    "llama3": NAMED.replace("arguments", "parameters"),
    "lfm2": "<|tool_call_start|>[weather(city='Pa \"ris\" <b>\n x', days=3, o={'a': [1, \"x\"]})]<|tool_call_end|>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Pa "ris" <b>\n x<|"|>,days:3,o:{a:[1,<|"|>x<|"|>]}}<tool_call|>',
    "nemotron": f"<TOOLCALL>[{NAMED}]</TOOLCALL>",
    "command": f"<|START_ACTION|>[{NAMED.replace('name', 'tool_name', 1).replace('arguments', 'parameters')}]"
    "<|END_ACTION|>",
    "gigachat": f"<|function_call|>{NAMED}<|message_sep|>",
    "granite": f"<|tool_call|>[{NAMED}]",
    "tool_calls": f"<tool_calls>\n{NAMED}\n</tool_calls>",
}
HARMONY = (
    "<|channel|>analysis<|message|>Weather?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    f"<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
)


def parsed(
    format: AnswerFormat, answer: str, prompt: str = "", whole: bool = True, cuts: tuple[int, ...] = ()
) -> Parts:
    parser = format.parser(TOOLS, prompt)
    parts = Parts()
    for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        parts += parser.push(answer[start:end])
    return parts + parser.finish(whole)


def plain(parts: Parts) -> tuple[str, str, list[tuple[str, Any]]]:
    """Without the ids of calls, which are drawn."""
    return parts.text, parts.reasoning, [(call.name, call.arguments) for call in parts.tool_calls]


def dialect(name: str, reasoning: str = "think") -> AnswerFormat:
    return choose_format("", (), reasoning, name)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_every_dialect(name: str) -> None:
    parts = parsed(dialect(name), CALLS[name])
    assert [(call.name, json.loads(call.arguments)) for call in parts.tool_calls] == [("weather", WEATHER)]
    assert (parts.text, parts.reasoning) == ("", "")


def test_every_dialect_is_tried() -> None:
    assert set(CALLS) == set(DIALECTS)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "llama3"])
def test_reasoning_and_text_around_a_call(name: str) -> None:
    behind = "" if name in ("mistral", "granite") else "\n\nDone."
    parts = parsed(dialect(name), f"<think>\nWhich tool?\n</think>\n\nI look.\n{CALLS[name]}{behind}")
    assert plain(parts)[:2] == (f"I look.{behind}", "Which tool?") and len(parts.tool_calls) == 1


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("garbage", ["{", "<function=", '{"name": 3}', "\ud7ff", "[", "weather(", '{"a":' * 3000])
def test_what_is_no_call_is_text_and_nothing_of_it_is_lost(name: str, garbage: str) -> None:
    opening, closing = next(iter(DIALECTS[name].blocks.items()))
    answer = f"Look: {opening}{garbage}{closing}"
    assert parsed(dialect(name), answer).text == answer
    cut = f"Look: {opening}{garbage}"
    assert parsed(dialect(name), cut, whole=False).text == cut


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_repeats_itself_costs_no_time(name: str) -> None:
    """Were a pattern tried at every mark up to the end, this would take minutes."""
    opening, closing = next(iter(DIALECTS[name].blocks.items()))
    for mark in ("<arg_key>k</arg_key><arg_value>", '<parameter name="k">', "<function=f>", *DIALECTS[name].marks):
        answer = opening + 20000 * mark + closing
        parts = parsed(dialect(name), answer)
        assert parts.text or parts.tool_calls


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_was_cut_is_text(name: str) -> None:
    answer = CALLS[name][: len(CALLS[name]) * 2 // 3]
    assert plain(parsed(dialect(name), answer, whole=False)) == (answer, "", [])


@settings(max_examples=60)
@given(st.sampled_from(sorted(CALLS)), st.data())
def test_parts_do_not_depend_on_how_an_answer_is_split(name: str, data: st.DataObject) -> None:
    answer = f"<think> a\n\n</think>\n\n{'' if name == 'llama3' else 'b < c  '}{CALLS[name]}"
    answer = answer[: data.draw(st.integers(0, len(answer)))]
    cuts = tuple(sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=12))))
    whole = data.draw(st.booleans())
    assert plain(parsed(dialect(name), answer, "", whole, cuts)) == plain(parsed(dialect(name), answer, "", whole))


@settings(max_examples=60)
@given(st.data())
def test_channels_do_not_depend_on_how_an_answer_is_split(data: st.DataObject) -> None:
    answer = HARMONY[: data.draw(st.integers(0, len(HARMONY)))]
    cuts = tuple(sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=12))))
    format = AnswerFormat(harmony=True)
    assert plain(parsed(format, answer, "", True, cuts)) == plain(parsed(format, answer))


MARKED = st.lists(
    st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "a", " ", "\n", "{", "</"])
)


@given(MARKED, st.booleans(), st.booleans())
def test_nothing_but_marks_and_space_is_lost_and_no_mark_is_shown(pieces: list[str], opened: bool, tools: bool) -> None:
    format, answer = dialect("hermes" if tools else "none"), "".join(pieces)
    prompt = "<think>\n" if opened else ""
    shown = ["" for _ in range(2)]
    parser = format.parser((), prompt)
    for character in answer:
        parts = parser.push(character)
        shown = [text + piece for text, piece in zip(shown, (parts.text, parts.reasoning), strict=True)]
        assert tools or not any(text.endswith("<think") or "<think>" in text for text in shown)
    parts = parser.finish()
    everything = "".join(shown) + parts.text + parts.reasoning
    for mark in ("<think>", "</think>"):
        everything, answer = everything.replace(mark, ""), answer.replace(mark, "")
    assert sorted("".join(everything.split())) == sorted("".join(answer.split()))


def test_channels_of_gpt_oss() -> None:
    format = choose_format("<|start|>system<|message|># Valid channels ... <|channel|>", ())
    parts = parsed(format, HARMONY)
    assert plain(parts) == ("I look.", "Weather?", [("weather", ARGUMENTS)])
    final = "<|channel|>analysis<|message|>Be brief.<|end|><|start|>assistant<|channel|>final<|message|>Hello"
    assert plain(parsed(format, final)) == ("Hello", "Be brief.", [])
    other = f" to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}"
    assert plain(parsed(format, other)) == ("", "", [("weather", ARGUMENTS)])
    assert plain(parsed(format, other[:-9], whole=False))[2] == []  # cut within the arguments
    assert plain(parsed(format, "Just text.")) == ("Just text.", "", [])
    assert plain(parsed(format, "<|channel|>fin", whole=False)) == ("", "", [])


def test_a_call_of_gpt_oss_is_sent_back_with_one_text() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    both = {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call]}
    one = {**both, "content": "", "reasoning_content": "Hm.\n\nI look."}
    others = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "thinking": "b"},
        {**both, "content": ""},
    ]
    assert AnswerFormat(harmony=True).sent_back([*others, both]) == [*others, one]
    assert AnswerFormat().sent_back([both]) == [both]


@pytest.mark.parametrize("marks", REASONING_MARKS.values(), ids=lambda marks: marks.name)
def test_every_kind_of_reasoning(marks: Any) -> None:
    format = AnswerFormat(marks)
    assert plain(parsed(format, f"{marks.start}\nHm.\n{marks.end}\n\nYes. ")) == ("Yes. ", "Hm.", [])
    assert plain(parsed(format, f"Hm.\n{marks.end}Yes.", f"user: ...{marks.start}\n")) == ("Yes.", "Hm.", [])
    assert plain(parsed(format, "Hm.", marks.start, whole=False)) == ("", "Hm.", [])
    assert plain(parsed(format, " Yes.", f"{marks.start}{marks.end}\n\n")) == (" Yes.", "", [])


def test_marks_around_an_answer_are_dropped_where_the_template_has_them() -> None:
    format = choose_format("... <think> ... <answer> ...", ())
    assert plain(parsed(format, "<think>\nHm.\n</think>\n<answer>\nYes.\n</answer>")) == ("Yes.", "Hm.", [])
    assert parsed(choose_format("<think>", ()), "<answer>x</answer>").text == "<answer>x</answer>"


def test_a_call_in_the_middle_of_reasoning_ends_it_where_its_mark_is_a_special_token() -> None:
    parts = parsed(dialect("kimi"), f"<think>Look.{CALLS['kimi']}")
    assert parts.reasoning == "Look." and len(parts.tool_calls) == 1
    assert parts.tool_calls[0].id == "functions.weather:0"
    assert parsed(dialect("hermes"), f"<think>{CALLS['hermes']}</think>Yes.").text == "Yes."


def test_bare_calls_need_tools() -> None:
    format = dialect("llama3")
    parser = format.parser()
    assert (parser.push(CALLS["llama3"]) + parser.finish()).text == CALLS["llama3"]
    assert len(parsed(format, " " + CALLS["llama3"]).tool_calls) == 1
    assert parsed(format, '{"a": 1} is JSON').text == '{"a": 1} is JSON'


def test_several_calls() -> None:
    for name, answer in {
        "hermes": CALLS["hermes"] + "\n" + CALLS["hermes"],
        "mistral": f"[TOOL_CALLS][{NAMED}, {NAMED}]",
        "llama3": f"{NAMED}; {NAMED}",
        "deepseek": DEEPSEEK.replace(
            "%s",
            f"weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}",
        ),
        "lfm2": "<|tool_call_start|>[weather(city='a', x=true), weather()]<|tool_call_end|>",
        "qwen3_coder": "<function=weather>\n</function>\n<function=weather>\n</function>",
    }.items():
        calls = parsed(dialect(name), answer).tool_calls
        assert [call.name for call in calls] == ["weather", "weather"], name
        assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize(
    ("value", "schema", "right"),
    [
        ("3", {"type": "string"}, "3"),
        ("3", {"type": "integer"}, 3),
        ("3", None, 3),
        ("null", {"type": ["integer", "null"]}, None),
        ("null", {"type": "string"}, "null"),
        ("3", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "3"),
        ("True", {"type": "boolean"}, True),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("x y", {"type": "integer"}, "x y"),
        ('"x"', None, '"x"'),
        ("a", {"enum": ["a", "b"]}, "a"),
        ("3", {"type": 7}, 3),
    ],
)
def test_values_without_quotes_have_the_types_of_the_schema(value: str, schema: Any, right: Any) -> None:
    tools = [{"function": {"name": "f", "parameters": {"properties": {"x": schema}}}}]
    parser = dialect("glm4").parser(tools)
    parts = parser.push(f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>")
    assert json.loads(parts.tool_calls[0].arguments) == {"x": right}


def test_arguments_are_text_that_can_be_written() -> None:
    parts = parsed(dialect("hermes"), '<tool_call>{"name": "f", "arguments": {"x": "\\ud800 é"}}</tool_call>')
    parts.tool_calls[0].arguments.encode()
    assert not parsed(dialect("hermes"), '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>').tool_calls


@pytest.mark.parametrize(
    ("template", "tokens", "right"),
    [
        ("<tool_call>\n<function=example", ["<tool_call>"], "tools qwen3_coder"),
        ("<think> <tool_call>", (), "reasoning think, tools hermes"),
        ("<tool_call>{name}<arg_key>", ["<think>"], "reasoning think, tools glm4"),
        ("[INST]", ["[TOOL_CALLS]"], "tools mistral"),
        ("nothing", (), "plain"),
        ("{% set t = '<tool_sep{}>'.format(x) %}{% set u = '<think{}>' %}", (), "reasoning hy_v3, tools hy_v3"),
    ],
)
def test_the_format_is_that_of_template_and_tokens(template: str, tokens: Any, right: str) -> None:
    assert str(choose_format(template, tokens)) == right


def test_a_format_can_be_named() -> None:
    assert choose_format("<think><|channel|>", (), "none", "none") == AnswerFormat()
    assert choose_format("", (), tool_parser="harmony").harmony
    with pytest.raises(ConfigError, match="--tool-parser 'x' is unknown; allowed: auto, none, harmony, dsml"):
        choose_format("", (), tool_parser="x")


def test_special_tokens_that_are_marks_reach_the_parser() -> None:
    backend = byte_level()
    backend.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "<other>"])
    tokenizer = Tokenizer(backend)
    format = choose_format("[TOOL_CALLS]", tokenizer.added)
    assert format.shown(tokenizer.specials) == {"[TOOL_CALLS]": "[TOOL_CALLS]", "[ARGS]": "[ARGS]"}
    text = TextStream(tokenizer, (), shown=format.shown(tokenizer.specials))
    stream, parts = AnswerStream(text, format.parser()), Parts()
    for token in tokenizer.encode('Hi <other>you[TOOL_CALLS]f[ARGS]{"x": 1}'):
        parts += stream.push(token)
    parts += stream.finish(whole=True)
    assert plain(parts) == ("Hi you", "", [("f", '{"x": 1}')])


def test_a_variant_of_a_mark_counts_as_it() -> None:
    assert AnswerFormat(harmony=True).shown(["<|channel|>2", "<|x|>"]) == {"<|channel|>2": "<|channel|>"}
