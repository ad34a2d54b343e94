"""Mistral's own tokenizer, tekken.json, as the tokenizer.json that other models have.

config           pattern; default_vocab_size, all tokens; default_num_special_tokens, the first of these
vocab            [{rank, token_bytes}], of which as many are used as there is room for; each is made of two others
special_tokens   [{rank, token_str}]; older files have none, and mean those of _OLDER
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError
from hybrid.files import read_json_object
from hybrid.files.reading import Reading

TEKKEN = "tekken.json"
BOS = "<s>"
NAMED = {"bos_token": BOS, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_OLDER = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_FILE = Reading(256 << 20, "restore the file", streams=False)
_LARGEST = 1 << 24  # tokens
_LONGEST = 256  # bytes of a token that is cut in two in every place
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that stand for themselves


def tekken_tokenizer(path: Path) -> bytes:
    """The contents of the tokenizer.json that a tekken.json stands for. Raises ConfigError."""
    pattern, texts, words = _read(path)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_added(index, text) for index, text in enumerate(texts)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, whole]},
        "post_processor": _begins_with(BOS, texts.index(BOS)) if BOS in texts else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {text: index for index, text in enumerate((*texts, *words))}, "merges": list(_merges(words)),
        },
    }  # fmt: skip
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def check_tekken(path: Path) -> None:
    """Raise ConfigError unless a tekken.json can be read."""
    _read(path)


def _read(path: Path) -> tuple[str, list[str], list[str]]:
    """The pattern by which a text is cut, the special tokens and the others, by id."""
    content = read_json_object(path, _FILE)
    pattern, size, special = _config(content, path)
    texts, words = _special_texts(content, special, path), _words(content, size - special, path)
    if (known := len({*texts, *words})) != size:
        raise _refuse(path, f"it has {known} different tokens, {size} are said")
    return pattern, texts, words


def _config(content: Mapping[str, Any], path: Path) -> tuple[str, int, int]:
    """The pattern, the number of all tokens, and that of those among them that are special."""
    config = content.get("config")
    found = config if isinstance(config, dict) else {}
    pattern, size, special = (
        found.get(name) for name in ("pattern", "default_vocab_size", "default_num_special_tokens")
    )
    if not isinstance(pattern, str) or not pattern:
        raise _refuse(path, f"config.pattern is {pattern!r:.40}, it must be a text")
    if type(size) is not int or type(special) is not int or not 0 <= special < size <= _LARGEST:
        raise _refuse(path, f"config says {size!r:.40} tokens, {special!r:.40} of them special")
    return pattern, size, special


def _special_texts(content: Mapping[str, Any], count: int, path: Path) -> list[str]:
    """Of all special tokens, by id; those that are not told have a number for a text."""
    given = content.get("special_tokens")
    told: dict[int, str] = dict(enumerate(_OLDER)) if given is None else {}
    if not isinstance(given, list | None):
        raise _refuse(path, f"special_tokens is {given!r:.40}, it must be a list")
    for token in given or ():
        index, text = (token.get("rank"), token.get("token_str")) if isinstance(token, dict) else (None, None)
        if type(index) is not int or not isinstance(text, str) or not text or index in told:
            raise _refuse(path, f"special token {token!r:.80} is none, or its rank that of another")
        told[index] = text
    if any(not 0 <= index < count for index in told):
        raise _refuse(path, f"of {count} special tokens one has rank {max(told)}")
    return [told.get(index, f"<SPECIAL_{index}>") for index in range(count)]


def _words(content: Mapping[str, Any], count: int, path: Path) -> list[str]:
    """The bytes of tokens in the letters that tokenizer.json has for them, by rank."""
    vocab = content.get("vocab")
    if not isinstance(vocab, list) or len(vocab) < count:
        raise _refuse(path, f"it has {len(vocab) if isinstance(vocab, list) else 0} words, {count} are said")
    letters = _letters()
    found = []
    for rank, word in enumerate(vocab[:count]):
        try:
            data = base64.b64decode(word["token_bytes"], validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error):
            data = b""
        if not data or word.get("rank") != rank or (rank < len(letters) and data != bytes([rank])):
            raise _refuse(path, f"word {rank} is {word!r:.80}")
        found.append(data.decode("latin-1").translate(letters))
    return found


def _merges(words: list[str]) -> Iterator[tuple[str, str]]:
    """All pairs that make a word, those of the first word first: a text is merged where the rank is lowest."""
    ranks = {word: rank for rank, word in enumerate(words)}
    for word in words:
        pairs = ((word[:at], word[at:]) for at in range(1, len(word) if len(word) <= _LONGEST else 0))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _letters() -> dict[int, str]:
    """What each byte is written as: itself where it can be seen, else a letter behind all bytes, in order."""
    others = [byte for byte in range(256) if byte not in _PRINTED]
    return {byte: chr(byte) for byte in _PRINTED} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _added(index: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": True}


def _begins_with(text: str, index: int) -> dict[str, Any]:
    first, one, two = (
        {"SpecialToken": {"id": text, "type_id": 0}},
        *({"Sequence": {"id": name, "type_id": 0}} for name in "AB"),
    )
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, two],
        "special_tokens": {text: {"id": text, "ids": [index], "tokens": [text]}},
    }


def _refuse(path: Path, problem: str) -> ConfigError:
    return ConfigError(f"{path}: the tokenizer in it cannot be used: {problem}; take another copy of the model")
