"""The grammar of a whole answer in a chat: what may be thought before, and what is then said or which tools are called.

It is written for the compiler's dialect of Lark, in which <[7]> is the token 7, and @answer0 the first part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid.core import Grammar
from hybrid.errors import RequestError
from hybrid.text.answer_format import AnswerFormat
from hybrid.text.grammar import ANSWER
from hybrid.text.grammar_check import Part, json_part, part_of, quoted
from hybrid.text.messages import ChatInput
from hybrid.text.tool_parsers.dialect import CallForm, types_of

_NAME = re.compile(r"[\w.:/-]{1,256}")
_TEXT = "/(?s:.*)/"
_SPACE = r"/[ \n]{1,4}/"
_HARMONY = CallForm("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", "")
_MAX_CALLS = 32  # of an answer, for small models go on for ever
_OBJECT = {"type": "object"}


@dataclass
class Frame:
    """A grammar as it is written. added: the tokens that were added to the tokenizer, with their ids."""

    added: Mapping[str, int]
    parts: list[Part] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)

    def part(self, part: Part) -> str:
        """What refers to a part from now on."""
        self.parts.append(part)
        return f"@{ANSWER}{len(self.parts) - 1}"

    def rule(self, body: str, stop: str = "") -> str:
        """What refers to a rule. stop: an attribute of it."""
        self.rules.append(f"r{len(self.rules)}{stop}: {body}")
        return f"r{len(self.rules) - 1}"

    def literal(self, text: str) -> str:
        """A text that must come as it is, added tokens in it as such."""
        return " ".join(f"<[{self.added[part]}]>" if part in self.added else quoted(part) for part in self._split(text))

    def text_to(self, end: str) -> str:
        """Any text up to this one, which is there too."""
        first = self._split(end)[0]
        if first in self.added:
            return f"{self.rule(_TEXT)} {self.literal(end)}"
        tail = self.literal(end[len(first) :])
        return f"{self.rule(_TEXT, f'[suffix={quoted(first)}]')} {tail}"

    def any_text(self) -> str:
        return f"{self.rule(_TEXT)}?"

    def _split(self, text: str) -> list[str]:
        names = sorted(filter(None, self.added), key=len, reverse=True)
        found = [name for name in names if name in text]
        pattern = "|".join(map(re.escape, found))
        return [part for part in re.split(f"({pattern})", text) if part] if found else [text] if text else []

    def __str__(self) -> str:
        return "\n".join(self.rules)


def answer_frame(
    answers: AnswerFormat, chat: ChatInput, prompt: str, grammar: Grammar | None, added: Mapping[str, int]
) -> Frame | None:
    """The grammar of the answer to a prompt, None where the model is free. Raises RequestError."""
    tools = offered_tools(chat)
    chosen = _chosen(chat, tools)
    strict = not chosen and any(_function(tool).get("strict") is True for tool in tools)
    if grammar is None and not chosen and not (strict and _told_apart(answers, added)):
        return None
    if chosen:  # the grammar is that of a text, of which there is none
        grammar = None
    frame = Frame(added)
    frame.rules.append("")  # its place is the first
    choices = []
    if grammar is not None:
        said = frame.part(part_of(grammar))
        choices.append(frame.literal("<|channel|>final<|message|>") + f" {said}" if answers.harmony else said)
    form = _HARMONY if answers.harmony else answers.form
    if chosen or (tools and form):
        if form is None:
            known = f"writes calls in a way ({answers}) that no grammar here describes"
            why = known if answers.dialect else "was not made to call tools, as far as its chat template says"
            raise RequestError(f"tool_choice: this model {why}; use 'auto' or 'none', or start with --tool-parser")
        calls = _calls(frame, form, chosen or tools, chosen is not None or strict, _several(chat))
        choices.append(calls)
        if strict and grammar is None:
            free = frame.any_text()
            harmony = frame.literal("<|channel|>final<|message|>")
            choices = [calls, f"{harmony} {free}"] if answers.harmony else [f"{free} ({calls})?"]
    frame.rules[0] = f"start: {_thought(frame, answers, prompt)}({' | '.join(choices)})"
    return frame


def offered_tools(chat: ChatInput) -> Sequence[Mapping[str, Any]]:
    """The tools that may be called."""
    return [] if chat.tool_choice == "none" else list(chat.tools or ())


def demands_call(chat: ChatInput) -> bool:
    """Whether a tool must be called."""
    return chat.tool_choice not in (None, "auto", "none")


def _told_apart(answers: AnswerFormat, added: Mapping[str, int]) -> bool:
    """Whether calls begin with a token of their own, so that they are known from a text."""
    if answers.harmony:
        return True
    form = answers.form
    first = (form.opening or form.begin) if form else ""
    return any(name and first.startswith(name) for name in added)


def _thought(frame: Frame, answers: AnswerFormat, prompt: str) -> str:
    """What may come before the answer."""
    if answers.harmony:
        begin, end = frame.literal("<|channel|>analysis<|message|>"), frame.text_to("<|end|><|start|>assistant")
        return f"({begin} {end})? "
    marks = answers.reasoning
    if marks is None or prompt.rstrip().endswith(marks.end.rstrip()):
        return ""
    rest = f"{frame.text_to(marks.end)} {frame.rule(_SPACE)}?"
    if prompt.rstrip().endswith(marks.start.rstrip()):
        return f"{rest} "
    return f"({frame.literal(marks.start)} {rest})? "


def _chosen(chat: ChatInput, tools: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]] | None:
    """The tools of which one must be called; None where none must."""
    choice = chat.tool_choice
    if not demands_call(chat):
        return None
    if not tools:
        raise RequestError("tool_choice demands a call, and there are no tools")
    if choice == "required":
        return tools
    name = None
    if isinstance(choice, Mapping):
        inner = choice.get("function", choice)
        name = inner.get("name") if isinstance(inner, Mapping) else None
    found = [tool for tool in tools if name is not None and _function(tool).get("name") == name]
    if not found:
        raise RequestError(
            f"tool_choice is {choice!r:.80}; it must be 'auto', 'none', 'required' or "
            '{"type": "function", "function": {"name": ...}} with the name of one of the tools'
        )
    return found[:1]


def _several(chat: ChatInput) -> bool:
    return chat.parallel_tool_calls and not isinstance(chat.tool_choice, Mapping)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = tool.get("function", tool)
    return inner if isinstance(inner, Mapping) else {}


def _calls(frame: Frame, form: CallForm, tools: Sequence[Mapping[str, Any]], strict: bool, several: bool) -> str:
    """strict: arguments are those of the schemas of all tools; else of those that say so themselves."""
    each = []
    for tool in tools:
        function = _function(tool)
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(f"a tool has the name {name!r:.80}; allowed are letters, digits, and . : / _ -")
        schema = function.get("parameters") or function.get("input_schema") or _OBJECT
        if not isinstance(schema, Mapping):
            raise RequestError(f"the parameters of the tool {name} are {schema!r:.80}; they must be a JSON schema")
        bound = function.get("strict") is not False if strict else function.get("strict") is True
        arguments = _arguments(frame, form, schema if bound else _OBJECT)
        begin, end = (frame.literal(part) for part in (form.begin.replace("{name}", name), form.end))
        each.append(f"{begin} {arguments} {end}")
    call = frame.rule(" | ".join(each))
    more = (
        f"({frame.literal(form.between)} {call}){{0,{_MAX_CALLS - 1}}}" if several and form.between is not None else ""
    )
    return f"{frame.literal(form.opening)} {call} {more} {frame.literal(form.closing)}"


def _arguments(frame: Frame, form: CallForm, schema: Mapping[str, Any]) -> str:
    if not form.before:
        return frame.part(json_part({"type": "object", **schema}))
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise RequestError(f"these parameters of a tool are no JSON schema: {schema!r:.80}")
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    written = []
    for key, value in properties.items():
        before = frame.literal(form.before.replace("{key}", str(key)))
        one = f"{before} {_value(frame, form, value, shared)}"
        written.append(one if key in required else f"({one})?")
    return " ".join(written)


def _value(frame: Frame, form: CallForm, schema: Any, shared: Mapping[str, Any]) -> str:
    """A parameter between its marks: a text as it is, everything else as JSON."""
    schema = _resolved(schema, shared)
    if "string" not in types_of(schema):
        part = json_part({**schema, **shared} if isinstance(schema, Mapping) else schema)
        return f"{frame.part(part)} {frame.literal(form.after)}"
    texts = schema.get("enum")
    if not isinstance(texts, list):
        return frame.text_to(form.after)
    choices = " | ".join(frame.literal(text if isinstance(text, str) else quoted(text)) or '""' for text in texts)
    return f"({choices}) {frame.literal(form.after)}"


def _resolved(schema: Any, shared: Mapping[str, Any]) -> Any:
    """The schema that a reference to one of the shared ones means."""
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if isinstance(reference, str) and reference.startswith("#/"):
        kind, _, name = reference[2:].partition("/")
        found = shared.get(kind, {})
        return found.get(name, schema) if isinstance(found, Mapping) else schema
    return schema
