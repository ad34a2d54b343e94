"""A tokenizer of bytes, whose tokens cut characters in half."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hybrid.text.tokenizer import Tokenizer

SPECIAL = 256


def byte_level() -> tokenizers.Tokenizer:
    """A tokenizer whose token i is byte i; 256 is special; 257 on are pairs that cut characters in half."""
    alphabet = {_byte_symbol(byte): byte for byte in range(256)}
    pairs = [(bytes([0xE4]), bytes([0xBD])), (bytes([0xA0]), bytes([0xE5])), (b"a", bytes([0xF0]))]
    symbols = [tuple(_byte_symbol(part[0]) for part in pair) for pair in pairs]
    vocab = {**alphabet, "<end>": SPECIAL, **{a + b: 257 + i for i, (a, b) in enumerate(symbols)}}
    backend = tokenizers.Tokenizer(models.BPE(vocab, symbols))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return backend


def _byte_symbol(byte: int) -> str:
    """The printable stand-in of a byte, by GPT-2's table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sorted({*range(256)} - {*printable}).index(byte))


BYTES = Tokenizer(byte_level())
