"""What a person types or pastes: one text, however many lines it has."""

from __future__ import annotations

import select
import sys
from contextlib import suppress

from hybrid.commands.console import coloured, say

QUOTES = '"""'  # around a text of several lines
_PASTE_SECONDS = 0.05  # in which the next line of a pasted text comes


class Keyboard:
    """Reads from a terminal, with editing and history where Python has them; or lines of a file or a pipe."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._pastes_whole = self.interactive and _load_readline()
        with suppress(AttributeError):  # replaced by something simpler
            sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]

    def read(self, prompt: str = "> ") -> str:
        """The next text. A line that ends in a backslash goes on; three quotes begin and end a text of several lines.

        Raises EOFError at the end, KeyboardInterrupt on Ctrl-C.
        """
        while True:
            text = self._read(prompt)
            wrong = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
            if wrong is None:
                return text
            say(f"note: this is not UTF-8 (byte 0x{ord(wrong) & 0xFF:02x}), so it was not sent; type it again")

    def _read(self, prompt: str) -> str:
        text = self._line(prompt)
        if text.strip().startswith(QUOTES):
            return self._quoted(text.strip().removeprefix(QUOTES))
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._line("... ")
        while self._pasted(text):
            text += "\n" + self._line("")
        return text.strip()

    def _quoted(self, text: str) -> str:
        while QUOTES not in text:
            text += "\n" + self._line("... ")
        return text[: text.index(QUOTES)].strip("\n")

    def _line(self, prompt: str) -> str:
        if not self.interactive:
            prompt = ""
        return input(coloured(prompt, "bold", editing=self._pastes_whole) if prompt else "").rstrip("\r")

    def _pasted(self, text: str) -> bool:
        """Whether more lines of a pasted text are there already, where nothing else tells them from typed ones."""
        if self._pastes_whole or not self.interactive or text.startswith("/"):
            return False
        with suppress(OSError, ValueError):  # no descriptor
            return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
        return False


def _load_readline() -> bool:
    """Give `input` editing and history; returns whether a pasted text then comes whole."""
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True
