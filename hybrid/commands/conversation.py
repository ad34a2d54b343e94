"""A conversation at the terminal: questions from the keyboard, answers as they are made."""

from __future__ import annotations

from contextlib import closing, suppress

from hybrid.commands.console import say, show
from hybrid.core import SamplingParams
from hybrid.errors import RequestError
from hybrid.serving.llm import LLM

_HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


class Conversation:
    """Messages so far, and the model that answers them."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params
        self.messages: list[dict[str, str]] = []
        llm.encode_chat([{"role": "user", "content": "Hello"}])  # a model that cannot chat is an error now

    def run(self) -> None:
        """Read and answer until the end of input, /exit, or Ctrl-C at the prompt."""
        with suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history
        say(_HELP)
        with suppress(EOFError, KeyboardInterrupt):
            while (line := input("> ").strip()) != "/exit":
                self._take(line)
        print()

    def _take(self, line: str) -> None:
        if line == "/clear":
            self.messages.clear()
        elif line.startswith("/"):
            say(_HELP)
        elif line:
            self._answer(line)

    def _answer(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        answer = ""
        try:
            with closing(self._llm.stream_chat(self.messages, self._params)) as deltas:
                for delta in deltas:
                    answer += delta.text
                    show(delta.text, end="")
        except KeyboardInterrupt:
            print(" ...", end="")
        except RequestError as error:
            say(f"error: {error}")
        print()
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()
