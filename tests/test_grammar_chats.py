"""Calls of tools and reasoning around what a grammar demands, as each family writes them: its parser reads them all."""

from __future__ import annotations

import json

import numpy as np
import pytest
from dummy_tokenizer import byte_level

pytest.importorskip("llguidance")

from hybrid import Grammar
from hybrid.errors import RequestError
from hybrid.text.answer_format import DIALECTS, AnswerFormat, choose_format
from hybrid.text.grammar import GrammarCompiler
from hybrid.text.grammar_frame import answer_frame
from hybrid.text.harmony import MARKS
from hybrid.text.messages import ChatInput
from hybrid.text.reasoning import REASONING
from hybrid.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "deep": {"$ref": "#/$defs/deep"},
        "exact": {"type": "boolean"},
    },
    "required": ["unit", "days", "deep"],
    "additionalProperties": False,
    "$defs": {
        "deep": {"type": "array", "items": {"enum": ['"', "</tool_call>"[:3]]}, "minItems": 1, "maxItems": 2},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}} for name in ("look", "get.x")
]
MESSAGES = [{"role": "user", "content": "?"}]
WRITTEN = [name for name, dialect in DIALECTS.items() if dialect.forms]
THINK = REASONING[0]


class Rig:
    """A tokenizer of bytes with the marks of a format as tokens of their own."""

    def __init__(self, answers: AnswerFormat, special: bool = True) -> None:
        self.answers = answers
        backend = byte_level()
        marks = list(answers.shown(dict.fromkeys(_marks(answers), 0))) if special else []
        backend.add_special_tokens(marks)
        self.tokenizer = Tokenizer(backend, eos_id=256)
        self.vocab = backend.get_vocab_size()
        self.compiler = GrammarCompiler(self.tokenizer, self.vocab, {256})

    def mask(self, prompt: str = "", grammar: Grammar | None = None, **chat):
        frame = answer_frame(self.answers, ChatInput(MESSAGES, **chat), prompt, grammar, self.tokenizer.added)
        return frame and self.compiler.masks(frame.parts, str(frame))[0]

    def takes(self, text: str, *given, **chat) -> bool:
        """Whether the answer may be this text as a whole."""
        mask = self.mask(*given, **chat)
        for token in [*self.tokenizer.encode(text), 256]:
            if mask.finished:
                return token == 256
            if not mask.allowed()[token]:
                return False
            mask.take(token)
        return True

    def walk(self, seed: int, **chat) -> str:
        """An answer at random, without reasoning and much white space."""
        mask, random, tokens = self.mask(**chat), np.random.default_rng(seed), []
        while not mask.finished and len(tokens) < 2000:
            may = [token for token in np.flatnonzero(mask.allowed()) if token != 256]
            if self.answers.harmony and len(tokens) == 1:
                may.remove(ord("a"))  # analysis
            black = [token for token in may if not (token < 256 and chr(token).isspace())]
            if not may or (256 in np.flatnonzero(mask.allowed()) and random.random() < 0.5):
                break
            tokens.append(int(random.choice(black or may)))
            mask.take(tokens[-1])
        pieces = {token: text for text, token in self.tokenizer.added.items()}
        raw = b"".join(pieces[t].encode() if t in pieces else bytes([t]) for t in tokens)
        return raw.decode()


def _marks(answers: AnswerFormat) -> list[str]:
    marks = list(MARKS) if answers.harmony else []
    for part in (answers.reasoning, answers.dialect):
        marks += part.marks if part else ()
    return [mark for mark in marks if mark.strip()]


def formats(name: str) -> list[AnswerFormat]:
    if name == "harmony":
        return [AnswerFormat(harmony=True)]
    dialect = DIALECTS[name]
    return [AnswerFormat(None, dialect, form=form) for form in dialect.forms]


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "texts"])
@pytest.mark.parametrize("name", [*WRITTEN, "harmony"])
def test_every_call_that_may_come_is_read(name, special) -> None:
    if name == "harmony" and not special:
        return
    for answers in formats(name):
        rig = Rig(answers, special)
        for seed in range(6):
            text = rig.walk(seed, tools=TOOLS, tool_choice="required")
            parser = answers.parser(TOOLS)
            parts = parser.push(text) + parser.finish(True)
            assert parts.tool_calls and not parts.text.strip(), text
            for call in parts.tool_calls:
                value = json.loads(call.arguments)
                assert call.name in ("look", "get.x") and value["unit"] in "CF" and 1 <= value["days"] <= 7, text
                assert {"unit", "days", "deep"} <= set(value) <= set(SCHEMA["properties"])
                assert value["deep"] and set(value["deep"]) <= {'"', "</t"}
        one = rig.walk(9, tools=TOOLS, tool_choice={"name": "get.x"})
        parser = answers.parser(TOOLS)
        assert [call.name for call in (parser.push(one) + parser.finish(True)).tool_calls] == ["get.x"]


def test_a_family_without_a_form_is_refused_where_a_call_is_demanded() -> None:
    for name in sorted({*DIALECTS} - {*WRITTEN}):
        rig = Rig(AnswerFormat(None, DIALECTS[name]))
        with pytest.raises(RequestError, match="no grammar here describes"):
            rig.mask(tools=TOOLS, tool_choice="required")
        assert rig.mask(tools=TOOLS) is None and rig.mask(tools=TOOLS, tool_choice="none") is None


def test_a_model_without_tools_is_told_apart_where_a_call_is_demanded() -> None:
    rig = Rig(AnswerFormat())
    with pytest.raises(RequestError, match="was not made to call tools"):
        rig.mask(tools=TOOLS, tool_choice="required")


def test_an_answer_begins_behind_the_reasoning() -> None:
    for marks in REASONING:
        for special in (True, False):
            rig, yes = Rig(AnswerFormat(marks), special), Grammar.choice(["yes", "no"])
            thought = f"{marks.start}Is it <b>{{1}}</b>?\n{marks.end}"
            assert rig.takes(f"{thought}\n\nyes", "Q", yes) and rig.takes("no", "Q", yes)
            assert not rig.takes(f"{thought}maybe", "Q", yes) and not rig.takes(thought, "Q", yes)
            assert rig.takes(f"Hm{marks.end}yes", f"Q{marks.start}", yes)
            assert not rig.takes("yes", f"Q{marks.start}\n", yes)
            assert rig.takes("yes", f"Q{marks.start}\n\n{marks.end}\n\n", yes)
            assert not rig.takes(f"{thought}yes", f"Q{marks.start}{marks.end}", yes)


def test_harmony_has_its_channels() -> None:
    rig = Rig(AnswerFormat(harmony=True))
    thought = "<|channel|>analysis<|message|>Hm {}<|end|><|start|>assistant"
    for before in ("", thought):
        assert rig.takes(f"{before}<|channel|>final<|message|>yes", "", Grammar.choice(["yes"]))
        assert not rig.takes(f"{before}<|channel|>final<|message|>no", "", Grammar.choice(["yes"]))


def test_strict_tools_and_a_form_leave_the_choice() -> None:
    rig = Rig(AnswerFormat(THINK, DIALECTS["hermes"], form=DIALECTS["hermes"].forms[0]))
    call = '<tool_call>\n{"name": "look", "arguments": {"unit": "C", "days": 3, "deep": ["\\""]}}\n</tool_call>'
    assert rig.takes("It rains.", tools=TOOLS) and rig.takes(f"Let me look.\n{call}", tools=TOOLS)
    assert rig.takes(f"<think>Hm</think>\n\n{call}\n{call}", tools=TOOLS)
    assert not rig.takes(call.replace("3", "9"), tools=TOOLS)
    assert not rig.takes(f"{call}\n{call}", tools=TOOLS, parallel_tool_calls=False)
    form = Grammar.json({"type": "integer"})
    assert rig.takes("7", "", form, tools=TOOLS) and rig.takes(call, "", form, tools=TOOLS)
    assert not rig.takes("seven", "", form, tools=TOOLS)
    assert not rig.takes(call, "", form, tools=TOOLS, tool_choice="none")


def test_texts_of_parameters_are_free_to_their_mark() -> None:
    tools = [{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}, "required": ["a"]}}]
    for name, text in (
        (
            "qwen3_coder",
            '<tool_call>\n<function=f>\n<parameter=a>\nif x < 3:\n  "y"\n</parameter>\n</function>\n</tool_call>',
        ),
        ("glm4", '<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>if x < 3:\n  "y"</arg_value>\n</tool_call>'),
    ):
        for special in (True, False):
            answers = formats(name)[-1]
            rig = Rig(answers, special)
            assert rig.takes(text, tools=tools, tool_choice="required")
            parser = answers.parser(tools)
            (call,) = (parser.push(text) + parser.finish(True)).tool_calls
            assert json.loads(call.arguments) == {"a": 'if x < 3:\n  "y"'}


def test_what_is_no_choice_is_refused() -> None:
    rig = Rig(formats("hermes")[0])
    for choice in ("always", {"name": "none"}, {"type": "function"}):
        with pytest.raises(RequestError, match="tool_choice"):
            rig.mask(tools=TOOLS, tool_choice=choice)
    with pytest.raises(RequestError, match="no tools"):
        rig.mask(tool_choice="required")
    with pytest.raises(RequestError, match="has the name"):
        rig.mask(tools=[{"name": 'a"b'}], tool_choice="required")
    assert choose_format("<tool_call>", ()).form is not None


def test_what_looks_like_a_mark_within_a_bound_answer_is_none() -> None:
    answers = AnswerFormat(THINK, DIALECTS["hermes"])
    texts = ['{"a": "<think>x</think> <tool_call>{}</tool_call>"}', "</think>"]
    call = '<tool_call>\n{"name": "look", "arguments": {"a": "</tool_call>\\n<tool_call>"}}\n</tool_call>'
    for before in ("", "<think>Hm</think>\n\n"):
        for size in (1, 5, 500):
            for text in texts:
                parser = answers.parser([], bound=True)
                whole = before + text
                parts = [parser.push(whole[at : at + size]) for at in range(0, len(whole), size)]
                parts.append(parser.finish(True))
                assert "".join(part.text for part in parts) == text
            parser = answers.parser(TOOLS, bound=True)
            whole = f"{before}{call}\n{call}"
            parts = [parser.push(whole[at : at + size]) for at in range(0, len(whole), size)]
            parts.append(parser.finish(True))
            calls = [one for part in parts for one in part.tool_calls]
            assert [json.loads(one.arguments)["a"] for one in calls] == ["</tool_call>\n<tool_call>"] * 2
