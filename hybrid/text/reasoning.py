"""Answers in which a model thinks before it speaks, and writes calls of tools among what it says."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hybrid.text.parts import MarkedParser, Parts, Voice
from hybrid.text.tool_parsers.dialect import Dialect, Tools

_WRONG = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)  # of what no model should write


@dataclass(frozen=True)
class ReasoningMarks:
    """What begins and ends reasoning. dropped: marks around the answer behind it, which are no part of it."""

    name: str
    start: str
    end: str
    dropped: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.start, self.end, *self.dropped)


REASONING = (
    ReasoningMarks("think", "<think>", "</think>", ("<answer>", "</answer>", "<response>", "</response>")),
    ReasoningMarks("mistral", "[THINK]", "[/THINK]"),
    ReasoningMarks("minimax_m3", "<mm:think>", "</mm:think>"),
    ReasoningMarks("seed", "<seed:think>", "</seed:think>"),
    ReasoningMarks("hy_v3", "<think:opensource>", "</think:opensource>"),
    ReasoningMarks("gemma4", "<|channel>thought\n", "<channel|>"),
    ReasoningMarks("command", "<|START_THINKING|>", "<|END_THINKING|>", ("<|START_RESPONSE|>", "<|END_RESPONSE|>")),
    ReasoningMarks("kimi_vl", "◁think▷", "◁/think▷"),
)


class TaggedParser(MarkedParser):
    """For answers whose reasoning and calls stand between marks.

    opened: the prompt has begun the reasoning already. bound: a grammar demands the answer, so that what looks like a
    mark within a text that it describes, or within a call, is none. A block that is no call, or is not finished, is
    text: nothing that a model wrote is lost.
    """

    def __init__(
        self,
        reasoning: ReasoningMarks | None,
        dialect: Dialect | None,
        tools: Tools = (),
        opened: bool = False,
        bound: bool = False,
    ) -> None:
        super().__init__()
        self._reasoning, self._dialect, self._tools = reasoning, dialect, tools
        self._bound, self._answered = bound, False
        self._said, self._thought = Voice(), Voice(" \n\t\r", begins=True)
        self._thinking = opened and reasoning is not None
        self._block: str | None = None  # of a call that is being written
        self._end = ""  # what ends it
        self._start: str | None = None  # white space before the first character, which may begin a bare call
        if dialect and dialect.bare and tools:
            self._start = ""

    def finish(self, whole: bool = True) -> Parts:
        parts = self._take(self._scanner.finish())
        if self._block is not None:
            parts += self._call(whole or not self._end)
        if not self._thinking:
            parts += Parts((self._start or "") + self._said.finish())
        return parts

    def _marks(self) -> Collection[str]:
        if self._block is not None:
            return [self._end] if self._end else []
        blocks = list(self._dialect.blocks) if self._dialect else []
        if self._thinking:
            assert self._reasoning
            return [self._reasoning.start, self._reasoning.end, *filter(_special, blocks)]
        if self._answered:
            return []
        if self._reasoning:
            blocks += [self._reasoning.start, *self._reasoning.dropped]
        return blocks

    def _take(self, text: str) -> Parts:
        if self._block is not None:
            self._block += text
            return Parts()
        if self._thinking:
            return Parts(reasoning=self._thought.say(text))
        if self._start is not None:
            text, self._start = self._start + text, None
            first = text.lstrip()
            if not first:
                self._start = text
                return Parts()
            if self._dialect and first.startswith(self._dialect.bare):
                self._block, self._end = text, ""
                return Parts()
        self._answered = self._bound and bool(self._answered or text.strip())
        return Parts(self._said.say(text))

    def _turn(self, mark: str) -> Parts:
        if self._block is not None:
            self._block += mark
            return Parts() if self._bound and not self._reads(self._block) else self._call()
        if self._answered:
            return self._take(mark)  # the text before it came at once with it
        self._thought.mark()
        if self._dialect and mark in self._dialect.blocks:
            self._thinking = False  # which some models forget to end
            self._block, self._end, self._start = mark, self._dialect.blocks[mark], None
            return Parts()
        self._said.mark()
        self._thinking = self._reasoning is not None and mark == self._reasoning.start
        return Parts()

    def _reads(self, block: str) -> bool:
        assert self._dialect
        try:
            return bool(self._dialect.parse(block, self._tools))
        except _WRONG:
            return False

    def _call(self, whole: bool = True) -> Parts:
        assert self._dialect and self._block is not None
        block, self._block = self._block, None
        try:
            if not whole:
                raise ValueError("what was cut may have been meant otherwise")
            calls = tuple(self._dialect.parse(block, self._tools))
        except _WRONG:
            return Parts(self._said.say(block))
        self._said.mark()
        return Parts(tool_calls=calls)


def _special(mark: str) -> bool:
    """Whether a mark is surely a special token, and not what a model may quote while it thinks."""
    return mark.startswith(("<|", "<｜"))
