"""What a GGUF file says about texts, as the files that its model had: tokenizer, chat templates, ends of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError
from hybrid.text.gguf_tokenizer import CONTROL, Vocabulary, adds_bos, make_tokenizer, read_vocabulary

TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_ENDS = ("eos", "eot", "eom")
# Texts of tokens that end an answer, whatever a file says; of a model with several messages in one answer, the last.
_END_TEXTS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>",
)  # fmt: skip
_MANY_MESSAGES = ("<|return|>", "<|call|>")  # ends of such an answer, in which <|end|> ends a message
_TEMPLATE = "tokenizer.chat_template"


def text_files(path: Path) -> dict[str, bytes]:
    """The files by name, none where a file has no vocabulary. Raises ConfigError and WeightsError."""
    vocabulary = read_vocabulary(path)
    if vocabulary is None:
        return {}
    return {
        TOKENIZER: make_tokenizer(vocabulary),
        TOKENIZER_CONFIG: _json(_tokenizer_config(vocabulary)),
        GENERATION_CONFIG: _json({"eos_token_id": sorted(set(_end_ids(vocabulary)))}),
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode(errors="replace")


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    ids = {ours: vocabulary.id(theirs) for theirs, ours in _NAMED.items()}
    named = {name: vocabulary.tokens[index] for name, index in ids.items() if index is not None}
    templates = _templates(vocabulary)
    return {**named, "add_bos_token": adds_bos(vocabulary), **({"chat_template": templates} if templates else {})}


def _templates(vocabulary: Vocabulary) -> str | list[dict[str, str]]:
    """One template, or several by name; the one without a name is the default."""
    found: dict[str, str] = {
        name.removeprefix(_TEMPLATE).lstrip(".") or "default": text
        for name, text in vocabulary.metadata.items()
        if name == _TEMPLATE or name.startswith(f"{_TEMPLATE}.")
    }
    for name, text in found.items():
        if not isinstance(text, str):
            raise ConfigError(f"{vocabulary.path}: its chat template {name:.40} is no text; take another copy")
    if set(found) <= {"default"}:
        return found.get("default", "")
    return [{"name": name, "template": text} for name, text in found.items()]


def _end_ids(vocabulary: Vocabulary) -> Iterator[int]:
    yield from (index for name in _ENDS if (index := vocabulary.id(name)) is not None)
    special = {
        token: index
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == CONTROL
    }
    many = all(text in special for text in _MANY_MESSAGES)
    for text in (*_END_TEXTS, *_MANY_MESSAGES):
        if text in special and not (many and text == "<|end|>"):
            yield special[text]
