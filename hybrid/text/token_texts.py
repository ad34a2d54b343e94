"""Single tokens as bytes and as texts, which decoding alone does not give: it joins them."""

from __future__ import annotations

import re

from hybrid.text.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _bytes_of_characters() -> dict[str, int]:
    """How tokenizers of bytes write them: those that can be printed as themselves, the others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class TokenTexts:
    """The bytes that each token stands for, a space before a word included."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._byte_level = tokenizer is not None and tokenizer.byte_level
        self._added = {id: text for text, id in tokenizer.added.items()} if tokenizer else {}
        self._characters = _bytes_of_characters()
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Empty for an id without a piece; a special token's are those of its name."""
        if token not in self._known:
            self._known[token] = self._make(token)
        return self._known[token]

    def text_of(self, token: int) -> str:
        """Bytes that are no whole characters are written as bytes:\\xe2\\x80."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _make(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.piece(token) if self._tokenizer else None
        if piece is None:
            return b""
        if self._byte_level:
            if all(character in self._characters for character in piece):
                return bytes(self._characters[character] for character in piece)
        elif byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()
