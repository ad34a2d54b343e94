"""A conversation: the messages so far, and what a model answers to them, as it is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hybrid.commands.console import reading_bar, say, show, show_json
from hybrid.commands.keyboard import Keyboard
from hybrid.core import Completion, SamplingParams, ToolCall
from hybrid.errors import HybridError, RequestError

if TYPE_CHECKING:
    from hybrid.serving.llm import LLM
    from hybrid.serving.stream import Stream

HELP = """\
/clear          forget the conversation
/regen          answer the last question again
/system TEXT    set the system message; alone it shows it, /system - removes it
/drop           forget the oldest question and its answer
/help           this
/exit           leave, as does Ctrl-D; Ctrl-C stops an answer
//text          a question that begins with a slash: /text
A line that ends in \\ goes on in the next; \"\"\" begins and ends a text of several lines.
Pasted text is one question."""
BRIEF = "/help says what can be typed; Ctrl-C stops an answer, Ctrl-D or /exit leaves"
_READING_SECONDS = 0.5  # after which a bar shows how much of a prompt was read
_ANSWER_TOKENS = 256  # that should be left for an answer, where old turns may be dropped


@dataclass(frozen=True)
class ChatInputs:
    """What goes with every question, and how a full context and reasoning are dealt with."""

    system: str | None = None
    tools: Sequence[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    drop_oldest: bool = False
    hide_reasoning: bool = False

    def messages(self, question: str) -> list[dict[str, Any]]:
        return [*system_messages(self.system), {"role": "user", "content": question}]


def system_messages(text: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text}] if text else []


class Conversation:
    """Messages so far, and the model that answers them. It keeps its keys and values, so that only what is new is
    computed.
    """

    def __init__(self, llm: LLM, params: SamplingParams, inputs: ChatInputs | None = None) -> None:
        self._llm, self._params = llm, params
        self._inputs = inputs or ChatInputs()
        self._attempts = 0  # answers to the last question but the first
        self.messages = system_messages(self._inputs.system)
        self._encode([*self.messages, {"role": "user", "content": "Hello"}])  # a model that cannot chat is an error now

    def run(self) -> None:
        """Read and answer until the end of input, /exit, or a second Ctrl-C at the prompt."""
        self._keyboard = Keyboard()
        if self._keyboard.interactive:
            say(f"{self._llm.describe()}\n{BRIEF}")
        interrupted = False
        try:
            while True:
                try:
                    text = self._keyboard.read()
                    interrupted = False
                except KeyboardInterrupt:
                    if interrupted:
                        break
                    interrupted = True
                    say("\n(Ctrl-C again, Ctrl-D or /exit leaves)")
                    continue
                if text in ("/exit", "/quit"):
                    break
                self._take(text)
        except EOFError:
            pass
        if self._keyboard.interactive:
            show("")

    def _take(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if text.startswith("//"):
            self._ask(text[1:])
        elif text == "/clear":
            self._clear()
        elif text == "/regen":
            self._answer_again()
        elif text == "/drop":
            self._drop_told()
        elif word == "/system":
            self._set_system(rest.strip())
        elif text == "/help":
            say(HELP)
        elif text.startswith("/"):
            say(f"there is no command {word}; /{text} sends it as a question, /help lists the commands")
        elif text:
            self._ask(text)

    def _clear(self) -> None:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self._llm.forget()

    def _set_system(self, text: str) -> None:
        others = [message for message in self.messages if message["role"] != "system"]
        if not text:
            old = next((message["content"] for message in self.messages if message["role"] == "system"), None)
            return say(f"the system message is: {old}" if old else "there is no system message")
        self.messages = [*system_messages(None if text == "-" else text), *others]

    def _ask(self, question: str) -> None:
        self._attempts = 0
        self.messages.append({"role": "user", "content": question})
        self._answer()

    def _answer_again(self) -> None:
        last = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)
        if last is None:
            return say("there is no question yet")
        if self._params.temperature == 0:
            say("note: --temperature is 0, so that the answer is the same again")
        self._attempts += 1
        del self.messages[last + 1 :]
        self._answer()

    def _answer(self) -> None:
        """Answer what was asked last, and go on while the model calls tools whose results are typed."""
        before = len(self.messages)
        while True:
            try:
                self._make_room()
                completion = self._stream()
            except HybridError as error:
                del self.messages[max(before - 1, 0) :]
                return say(f"error: {error}{self._advice(error)}")
            if not (completion.text or completion.tool_calls or completion.reasoning):
                del self.messages[max(before - 1, 0) :]
                return
            self.messages.append(completion.message)
            if completion.finish_reason != "stop" or not completion.tool_calls:
                return self._tell_end(completion)
            self.messages += [self._result(call) for call in completion.tool_calls]

    def _stream(self) -> Completion:
        """Show an answer as it is made; Ctrl-C ends it."""
        printer = AnswerPrinter(self._inputs.hide_reasoning)
        with closing(self._open()) as stream:
            try:
                show_progress(stream)
                for delta in stream:
                    printer.show(delta.reasoning, delta.text, delta.tool_calls)
            except KeyboardInterrupt:
                printer.show("", " ...", ())
            finally:
                printer.end()
        return stream.completion

    def _open(self) -> Stream:
        params = self._params
        if params.seed is not None:
            params = replace(params, seed=params.seed + self._attempts)
        inputs = self._inputs
        return self._llm.stream_chat(
            self.messages, params, tools=inputs.tools, template_kwargs=inputs.template_kwargs, keep=True
        )

    def _result(self, call: ToolCall) -> dict[str, Any]:
        text = ""
        if self._keyboard.interactive:
            try:
                text = self._keyboard.read(f"result of {call.name}> ")
            except KeyboardInterrupt:
                say("")
        return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text or "no result"}

    def _encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        inputs = self._inputs
        return self._llm.encode_chat(messages, tools=inputs.tools, template_kwargs=inputs.template_kwargs)

    def _make_room(self) -> None:
        """Forget the oldest turns if the context is full and that was chosen."""
        if not self._inputs.drop_oldest:
            return
        context, dropped = self._llm.max_tokens, 0
        room = min(_ANSWER_TOKENS, context // 4)
        while len(self._encode(self.messages)) + room > context and self._drop_oldest():
            dropped += 1
        if dropped:
            say(f"note: the context is full; forgot the oldest {'turn' if dropped == 1 else f'{dropped} turns'}")

    def _drop_oldest(self, besides: int = 1) -> bool:
        """Forget the first question and all up to the next; returns whether there were more than `besides`."""
        asked = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if len(asked) <= besides:
            return False
        del self.messages[asked[0] : (*asked, len(self.messages))[1]]
        return True

    def _drop_told(self) -> None:
        say("forgot the oldest question and its answer" if self._drop_oldest(0) else "there is no question yet")

    def _tell_end(self, completion: Completion) -> None:
        """Say why an answer was cut."""
        if completion.finish_reason != "length":
            return
        used, context = len(completion.prompt_token_ids) + len(completion.token_ids), self._llm.max_tokens
        if used >= context:
            say(f"note: the answer was cut: the context of {context} tokens is full; {_FULL}")
        else:
            say(f"note: the answer was cut after {len(completion.token_ids)} tokens, which --max-tokens allows")

    def _advice(self, error: HybridError) -> str:
        full = isinstance(error, RequestError) and "tokens, and a sequence may have" in str(error)
        return f"; or {_FULL}" if full and len(self.messages) > 1 else ""


_FULL = "/clear forgets the conversation, /drop its oldest turn, --when-full drop does that by itself"


class AnswerPrinter:
    """Shows the parts of an answer. A terminal gets reasoning too, dimmed, with an empty line before what is said; a
    file or a pipe gets calls as JSON.
    """

    def __init__(self, hide_reasoning: bool = False) -> None:
        self._terminal = sys.stdout.isatty()
        self._hide = hide_reasoning or not self._terminal
        self.shown = False
        self._thinking = self._line = False  # whether reasoning was shown last; whether a line is begun

    def show(self, reasoning: str, text: str, calls: Sequence[ToolCall]) -> None:
        if reasoning and not self._hide:
            show(reasoning, end="", dim=True)
            self._thinking = self.shown = True
        if (text or calls) and self._thinking:
            show("\n")
            self._thinking = False
        if text:
            show(text, end="")
            self._line = self.shown = True
        for call in calls:
            self.end()
            self.shown = True
            if self._terminal:
                show(f"{call.name}({call.arguments})")
            else:
                show_json(call.to_dict())

    def end(self) -> None:
        """What follows begins a line."""
        if self._line or self._thinking:
            show("")
        self._line = self._thinking = False


def show_progress(stream: Stream) -> None:
    """Wait for the first piece, with a bar if it takes long."""
    if not sys.stderr.isatty() or stream.ready(_READING_SECONDS):
        return
    with reading_bar() as bar:
        while not stream.ready(_READING_SECONDS / 4):
            bar(*stream.prompt_progress)
