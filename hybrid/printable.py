"""Text that is safe to show: a checkpoint, a file name or a model cannot steer the terminal that shows it."""

from __future__ import annotations

_CONTROLS = (
    (0x00, 0x20),  # C0: escape sequences, the bell, a carriage return that overwrites its line
    (0x7F, 0xA0),  # delete, and C1: escape sequences of one character
    (0x2028, 0x202F),  # line separators, and what turns the direction of text that follows
    (0x2066, 0x2070),  # isolates, and format characters that are no longer used
    (0xD800, 0xE000),  # halves of surrogate pairs, which no encoding can write
    (0xFFF9, 0xFFFC),  # annotations, which hide text
)
_ESCAPES = {code: f"\\u{code:04x}" for first, end in _CONTROLS for code in range(first, end)}
del _ESCAPES[ord("\n")], _ESCAPES[ord("\t")]


def printable(text: str) -> str:
    """The text with every control character as \\u001b, which JSON means by it too. Lines and tabs stay."""
    return text if text.isascii() and text.isprintable() else text.translate(_ESCAPES)
