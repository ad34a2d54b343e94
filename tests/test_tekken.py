"""Mistral's own vocabulary, tekken.json: the ids that merging by rank gives, and files that are none."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

from hybrid import LLM
from hybrid.errors import ConfigError
from hybrid.text import convert
from hybrid.text.convert import require_readable
from hybrid.text.special_tokens import read_special_tokens
from hybrid.text.tekken import tekken_tokenizer
from hybrid.text.tokenizer_backend import parse_backend

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
SPECIAL = 24
WORDS = [
    *(bytes([byte]) for byte in range(256)),
    b"bc",
    b"ab",
    b"abc",
    b" a",
    b"\xc3\xa9",
    b"aa",
    b"caa",
    b"aaaa",
    b"  ",
]
UNUSED = b"never used"


def tekken(**changes: Any) -> dict[str, Any]:
    """A file of older versions: without special tokens, and with more words than are used."""
    words = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for rank, word in enumerate([*WORDS, UNUSED])
    ]
    sizes = {"default_vocab_size": SPECIAL + len(WORDS), "default_num_special_tokens": SPECIAL}
    return {"config": {"pattern": PATTERN, "version": "v3", **sizes}, "vocab": words, **changes}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def merged(word: bytes) -> list[int]:
    """By definition: a word that is known is taken whole, else the pair of the lowest rank is merged, the first one."""
    ranks = {known: rank for rank, known in enumerate(WORDS)}
    if word in ranks:
        return [SPECIAL + ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [ranks.get(a + b, len(WORDS)) for a, b in zip(parts, parts[1:], strict=False)]
        if not pairs or min(pairs) == len(WORDS):
            return [SPECIAL + ranks[part] for part in parts]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_words_are_merged_by_rank(tmp_path: Path) -> None:
    backend = parse_backend(tekken_tokenizer(written(tmp_path / "tekken.json", tekken())), tmp_path)
    random = np.random.default_rng(0)
    for _ in range(300):
        word = "".join(random.choice(list("aabbccxé"), random.integers(1, 12)))
        assert backend.encode(word, add_special_tokens=False).ids == merged(word.encode()), word
        assert backend.decode(merged(word.encode())) == word
    text = "abc  é\r\n1 ab🤖\x00"
    ids = backend.encode(text).ids
    assert ids[0] == 1 and backend.decode(ids) == text
    assert backend.get_vocab_size() == SPECIAL + len(WORDS)


@pytest.mark.parametrize(
    ("told", "known"),
    [
        (None, {"[INST]": 3, "[TOOL_CONTENT]": 19, "<SPECIAL_20>": 20}),
        (["<unk>", "<s>", "</s>", "[THINK]"], {"[THINK]": 3, "<SPECIAL_4>": 4, "<SPECIAL_23>": 23}),
    ],
)
def test_special_tokens_come_first(tmp_path: Path, told: list[str] | None, known: dict[str, int]) -> None:
    """Those that a file does not tell have numbers for names."""
    special = told and [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(told)]
    path = written(tmp_path / "tekken.json", tekken(special_tokens=special))
    backend = parse_backend(tekken_tokenizer(path), path)
    assert {text: backend.token_to_id(text) for text in known} == known
    name = next(iter(known))
    assert backend.encode(f"a{name}b", add_special_tokens=False).ids == [SPECIAL + 97, 3, SPECIAL + 98]
    assert backend.decode([SPECIAL + 97, 3]) == "a"


def test_a_model_with_nothing_else_is_used_without_what_converts(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda module: None)
    source = write_checkpoint(tmp_path / "model", "llama", vocab_size=SPECIAL + len(WORDS))
    written(source / "tekken.json", tekken())
    require_readable(source)
    for _ in range(2):
        with LLM(source, cache_dir=tmp_path / "cache") as llm:
            assert llm.tokenizer is not None and llm.tokenizer.encode("abc") == [1, *merged(b"abc")]
            store = llm.engine.store.path
    assert (store / "tokenizer.json").is_file()
    for folder in (source, store):
        assert read_special_tokens(folder).defaults["eos_token"] == "</s>"


CONFIG = tekken()["config"]
VOCAB = tekken()["vocab"]
TOKEN = {"rank": 0, "token_str": "<unk>"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "config.pattern is None"),
        ({"config": {**CONFIG, "pattern": 3}}, "config.pattern is 3, it must be a text"),
        ({"config": {**CONFIG, "default_vocab_size": "many"}}, "config says 'many' tokens, 24 of them special"),
        ({"config": {**CONFIG, "default_num_special_tokens": 1000}}, "config says 289 tokens, 1000 of them special"),
        ({"config": {**CONFIG, "default_vocab_size": 1 << 40}}, "config says 1099511627776 tokens"),
        ({"config": {**CONFIG, "default_num_special_tokens": 3}}, "of 3 special tokens one has rank 19"),
        ({"vocab": VOCAB[:200]}, "it has 200 words, 265 are said"),
        ({"vocab": 3}, "it has 0 words"),
        ({"vocab": [VOCAB[1], *VOCAB[1:]]}, "word 0 is {'rank': 1"),
        ({"vocab": [*VOCAB[:256], {"rank": 256, "token_bytes": "%%"}, *VOCAB[257:]]}, "word 256 is"),
        ({"vocab": [*VOCAB[:256], {"rank": 256, "token_bytes": ""}, *VOCAB[257:]]}, "word 256 is"),
        ({"vocab": [*VOCAB[:256], {**VOCAB[257], "rank": 256}, *VOCAB[257:]]}, "it has 288 different tokens, 289 are"),
        ({"special_tokens": [TOKEN, TOKEN]}, "special token {'rank': 0, .* or its rank that of another"),
        ({"special_tokens": [{"rank": 0}]}, "special token {'rank': 0} is none"),
        ({"special_tokens": [TOKEN, {**TOKEN, "rank": 1}]}, "it has 288 different tokens"),
        ({"special_tokens": {"rank": 0}}, "special_tokens is {'rank': 0}, it must be a list"),
        ({"special_tokens": 24}, "special_tokens is 24, it must be a list"),
    ],
)
def test_files_that_are_none_are_refused_before_anything_is_packed(tmp_path: Path, changes: Any, message: str) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    written(source / "tekken.json", tekken(**changes))
    with pytest.raises(ConfigError, match=rf"tekken.json: the tokenizer in it cannot be used: .*{message}") as error:
        LLM(source, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value) and not (tmp_path / "cache").exists()
