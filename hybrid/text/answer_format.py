"""How the answers of a model are written: which marks are around reasoning, and in which dialect it calls tools."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hybrid.errors import ConfigError
from hybrid.text.harmony import MARKS, HarmonyParser
from hybrid.text.messages import REASONING_FIELDS, Message
from hybrid.text.parts import AnswerParser
from hybrid.text.reasoning import REASONING, ReasoningMarks, TaggedParser
from hybrid.text.tool_parsers import deepseek, gemma4, glm4, hermes, invoke, json_blocks, kimi, lfm2, llama3, mistral
from hybrid.text.tool_parsers import qwen3_coder as coder
from hybrid.text.tool_parsers.dialect import CallForm, Dialect, Tools

AUTO, NONE, HARMONY = "auto", "none", "harmony"
# In the order in which their signs are looked for: <tool_call> is a sign of the last alone, for others have it too.
DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        invoke.DSML,
        invoke.MINIMAX_M3,
        invoke.MINIMAX,
        deepseek.DIALECT,
        kimi.DIALECT,
        glm4.HUNYUAN,
        glm4.DIALECT,
        coder.DIALECT,
        gemma4.DIALECT,
        lfm2.DIALECT,
        mistral.DIALECT,
        json_blocks.NEMOTRON,
        json_blocks.COMMAND,
        json_blocks.GIGACHAT,
        json_blocks.TOOL_LIST,
        json_blocks.TOOL_CALLS,
        hermes.DIALECT,
        llama3.DIALECT,
    )
}
REASONING_MARKS: Mapping[str, ReasoningMarks] = {marks.name: marks for marks in REASONING}


@dataclass(frozen=True)
class AnswerFormat:
    """harmony: answers come in channels, and the rest says nothing. form: how a grammar writes calls, if it can."""

    reasoning: ReasoningMarks | None = None
    dialect: Dialect | None = None
    harmony: bool = False
    form: CallForm | None = None

    def __str__(self) -> str:
        if self.harmony:
            return HARMONY
        parts = (("reasoning", self.reasoning), ("tools", self.dialect))
        return ", ".join(f"{what} {part.name}" for what, part in parts if part) or "plain"

    def parser(self, tools: Tools = (), prompt: str = "", bound: bool = False) -> AnswerParser:
        """A parser of one answer. prompt: what it answers, which may have begun the reasoning. bound: a grammar demands
        the answer as a whole.
        """
        if self.harmony:
            return HarmonyParser()
        opened = self.reasoning is not None and prompt.rstrip().endswith(self.reasoning.start.rstrip())
        return TaggedParser(self.reasoning, self.dialect, tools, opened, bound)

    def sent_back(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Messages as the template takes them: that of gpt-oss refuses a call with both reasoning and a text before it,
        and writes either as analysis.
        """
        if not self.harmony or not isinstance(messages, (list, tuple)):
            return messages
        return [_joined_analysis(message) for message in messages]

    def shown(self, specials: Collection[str]) -> dict[str, str]:
        """The special tokens that a parser must see, and as what: those in a mark, and variants that begin with one."""
        marks: tuple[str, ...] = MARKS if self.harmony else ()
        for part in (self.reasoning, self.dialect):
            marks += part.marks if part else ()
        shown = {}
        for text in filter(str.strip, specials):
            whole = next((mark for mark in marks if text.startswith(mark)), None)
            if whole or any(text in mark for mark in marks):
                shown[text] = whole or text
        return shown


def choose_format(
    template: str, tokens: Collection[str], reasoning: str = AUTO, tool_parser: str = AUTO
) -> AnswerFormat:
    """What a chat template and the added tokens of a tokenizer say, unless a name is given. Raises ConfigError."""
    _check("--reasoning-parser", reasoning, REASONING_MARKS)
    _check("--tool-parser", tool_parser, DIALECTS)
    if HARMONY in (reasoning, tool_parser) or (AUTO in (reasoning, tool_parser) and MARKS[1] in template):
        return AnswerFormat(harmony=True)
    marks = REASONING_MARKS.get(reasoning) or (_reasoning(template, tokens) if reasoning == AUTO else None)
    dialect = DIALECTS.get(tool_parser) or (_dialect(template, tokens) if tool_parser == AUTO else None)
    form = next((form for form in dialect.forms if form.sign in template), None) if dialect else None
    return AnswerFormat(marks, dialect, form=form)


def _joined_analysis(message: Message) -> Message:
    if not isinstance(message, Mapping) or not message.get("tool_calls"):
        return message
    name = next((name for name in REASONING_FIELDS if message.get(name)), None)
    text = message.get("content")
    if name is None or not isinstance(text, str) or not text:
        return message
    return {**message, "content": "", name: f"{message[name]}\n\n{text}"}


def _check(flag: str, name: str, known: Collection[str]) -> None:
    allowed = (AUTO, NONE, HARMONY, *known)
    if name not in allowed:
        raise ConfigError(f"{flag} {name!r:.80} is unknown; allowed: {', '.join(allowed)}")


def _reasoning(template: str, tokens: Collection[str]) -> ReasoningMarks | None:
    for marks in REASONING:
        signs = (marks.start.strip(), marks.start.replace(":opensource", "{}"))
        if any(sign in template or sign in tokens for sign in signs):
            dropped = tuple(mark for mark in marks.dropped if mark.replace("/", "") in template)
            return ReasoningMarks(marks.name, marks.start, marks.end, dropped)
    return None


def _dialect(template: str, tokens: Collection[str]) -> Dialect | None:
    """By the template where it says how tools are called, else by the tokens."""
    for source in (template, tokens):
        for dialect in DIALECTS.values():
            if any(sign in source for sign in dialect.signs):
                return dialect
    return None
