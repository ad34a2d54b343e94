"""What GGUF files say of texts: tokenizers of both kinds, special tokens, templates and ends of answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gguf_rig import write_gguf
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from hybrid.errors import ConfigError
from hybrid.text.chat_template import load_template
from hybrid.text.gguf_patterns import CUTTINGS
from hybrid.text.gguf_texts import text_files
from hybrid.text.gguf_tokenizer import MODELS, make_tokenizer, read_vocabulary
from hybrid.text.tokenizer import Tokenizer, load_tokenizer, read_eos_ids
from hybrid.text.tokenizer_backend import parse_backend

BYTES = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256)), *map(chr, range(256, 324))]
WORDS = ["el", "lo", "hel", "hello", "Ġhello", "12"]
MERGES = ["e l", "l o", "h el", "hel lo", "Ġ hello", "1 2"]


def merged(**changes: Any) -> dict[str, Any]:
    """A vocabulary of bytes and a few words."""
    tokens = [*BYTES, *WORDS, "<|im_start|>", "<|im_end|>", "<think>"]
    values = {
        "model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": MERGES,
        "token_type": [*[1] * (len(tokens) - 3), 3, 3, 4], "bos_token_id": tokens.index("<|im_start|>"),
        "eos_token_id": tokens.index("<|im_end|>"), **changes,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def scored(**changes: Any) -> dict[str, Any]:
    """A vocabulary of pieces with scores, as sentencepiece makes them."""
    pieces = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁hell", "▁he"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    values = {
        "model": "llama", "tokens": tokens, "scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)], "bos_token_id": 1, "eos_token_id": 2,
        "unknown_token_id": 0, **changes,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}


def texts_of(folder: Path, metadata: dict[str, Any]) -> Path:
    """The folder with the files that a GGUF file's texts become."""
    for name, content in text_files(write_gguf(folder / "model.gguf", metadata, {})).items():
        (folder / name).write_bytes(content)
    return folder


def tokenizer(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    found = load_tokenizer(texts_of(folder, metadata))
    assert found is not None
    return found


def pieces(found: Tokenizer, metadata: dict[str, Any], text: str) -> list[str]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return [tokens[index] for index in found.encode(text)]


def test_pairs_are_merged(tmp_path: Path) -> None:
    metadata = merged()
    found = tokenizer(tmp_path, metadata)
    text = " hello<|im_end|>hello 12<think>é"
    expected = ["Ġhello", "<|im_end|>", "hello", "Ġ", "1", "2", "<think>", "Ã", "©"]
    assert pieces(found, metadata, text) == expected
    assert found.decode(found.encode(text)) == " hellohello 12<think>é"
    assert found.specials.keys() == {"<|im_start|>", "<|im_end|>"} and "<think>" in found.added


def test_patterns_are_those_of_the_name(tmp_path: Path) -> None:
    """Digits one by one, in threes, or all."""
    metadata = merged(pre="llama-bpe", add_bos_token=False)
    assert pieces(tokenizer(tmp_path, metadata), metadata, "1212") == ["12", "1", "2"]
    metadata = merged(pre="gpt-2")
    assert pieces(tokenizer(tmp_path, metadata), metadata, "1212") == ["12", "12"]


def test_a_word_that_is_a_token_may_be_taken_whole(tmp_path: Path) -> None:
    lacking = [merge for merge in MERGES if "hello" not in merge]
    for pre, expected in (("llama-bpe", ["Ġhello"]), ("qwen2", ["Ġ", "hello"])):
        metadata = merged(pre=pre, merges=lacking, add_bos_token=False)
        assert pieces(tokenizer(tmp_path, metadata), metadata, " hello") == expected


def test_what_begins_and_ends_a_text(tmp_path: Path) -> None:
    metadata = merged(pre="llama-bpe")
    assert pieces(tokenizer(tmp_path, metadata), metadata, "12") == ["<|im_start|>", "12"]
    metadata = merged(add_bos_token=True, add_eos_token=True)
    assert pieces(tokenizer(tmp_path, metadata), metadata, "1") == ["<|im_start|>", "1", "<|im_end|>"]


def test_pieces_with_scores(tmp_path: Path) -> None:
    metadata = scored()
    found = tokenizer(tmp_path, metadata)
    assert pieces(found, metadata, "hello hell") == ["<s>", "▁hello", "▁hell"]
    assert pieces(found, metadata, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert pieces(found, metadata, "</s>he") == ["<s>", "</s>", "▁he"]
    assert found.decode(found.encode("hello é hell")) == "hello é hell"
    metadata = scored(add_space_prefix=False, add_bos_token=False)
    found = tokenizer(tmp_path, metadata)
    assert pieces(found, metadata, "hello hell") == ["hello", "▁hell"] and found.decode(found.encode(" he")) == " he"


def test_pieces_of_sarvam_have_merges(tmp_path: Path) -> None:
    """Though their vocabulary is called as those of bytes are."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "he", "▁he"]
    types = [2, *[6] * 256, *[1] * 5]
    changes = {"tokens": tokens, "token_type": types, "merges": ["h e", "▁ he"], "unknown_token_id": 0}
    metadata = merged(pre="sarvam-moe", bos_token_id=None, eos_token_id=None, **changes)
    found = tokenizer(tmp_path, metadata)
    assert pieces(found, metadata, "he he\n") == ["he", "▁he", "<0x0A>"] and found.decode(found.encode(" he")) == " he"


def test_names_templates_and_ends(tmp_path: Path) -> None:
    template = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    folder = texts_of(tmp_path, {**merged(eot_token_id=5), **template})
    found = load_template(folder)
    assert found and found.render([{"role": "user", "content": "a"}]) == "<|im_start|>a"
    assert read_eos_ids(folder, None) == {5, len(BYTES) + len(WORDS) + 1}
    folder = texts_of(tmp_path, {**merged(), **template, "tokenizer.chat_template.tool_use": "tools"})
    found = load_template(folder)
    assert found and found.with_tools == "tools"


def test_a_message_may_end_before_the_answer(tmp_path: Path) -> None:
    """<|end|> ends an answer, but not where <|return|> and <|call|> do."""
    for more, expected in ((["<|end|>"], {0}), (["<|end|>", "<|return|>", "<|call|>"], {1, 2})):
        tokens = [*BYTES, *more]
        types = [*[1] * len(BYTES), *[3] * len(more)]
        ids = {index - len(BYTES) for index in read_eos_ids(
            texts_of(tmp_path, merged(tokens=tokens, token_type=types, bos_token_id=None, eos_token_id=None)), None
        )}  # fmt: skip
        assert ids == expected


def test_no_vocabulary(tmp_path: Path) -> None:
    assert text_files(write_gguf(tmp_path / "a.gguf", {"tokenizer.ggml.model": "no_vocab"}, {})) == {}


WRONG = {
    "model": (merged(model="bert"), "tokenizer.ggml.model is 'bert', known are gpt2, llama"),
    "pre": (merged(pre="abc"), "tokenizer.ggml.pre is 'abc', known are a.x-4.0, "),
    "no pre": (merged(pre=None), "tokenizer.ggml.pre is None, known are"),
    "tokens": (merged(tokens=None), "it has 0 tokens"),
    "numbers": (merged(tokens=[1, 2]), "tokenizer.ggml.tokens is not a list of str"),
    "types": (merged(token_type=[1]), "tokens and 1 types of tokens"),
    "scores": (scored(scores=[1.0]), "tokens and 1 scores"),
    "id": (merged(eos_token_id=10**6), "tokenizer.ggml.eos_token_id is 1000000, there are"),
    "flag": (merged(add_bos_token=3), "tokenizer.ggml.add_bos_token is 3, it must be true or false"),
    "template": ({**merged(), "tokenizer.chat_template": 3}, "its chat template default is no text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_texts_that_cannot_be(tmp_path: Path, case: str) -> None:
    metadata, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as raised:
        text_files(write_gguf(tmp_path / "model.gguf", metadata, {}))
    assert "\n" not in str(raised.value)


def test_every_pattern_can_be_used(tmp_path: Path) -> None:
    for pre in CUTTINGS:
        metadata = merged(pre=pre, add_bos_token=False)
        found = tokenizer(tmp_path, metadata)
        assert found.decode(found.encode(" hello 12 é \n\n")) == " hello 12 é \n\n"


VOCABULARIES = os.environ.get("HYBRID_TEST_VOCABULARIES")  # a folder with ggml-vocab-*.gguf, .inp and .out beside them


@pytest.mark.skipif(not VOCABULARIES, reason="HYBRID_TEST_VOCABULARIES names no folder with vocabularies of llama.cpp")
def test_vocabularies_of_llama_cpp() -> None:
    compared = 0
    for path in sorted(Path(VOCABULARIES or "").glob("ggml-vocab-*.gguf")):
        texts, ids = (path.with_name(f"{path.name}.{kind}") for kind in ("inp", "out"))
        try:
            vocabulary = read_vocabulary(path)
            assert vocabulary and vocabulary.model in MODELS
            backend = parse_backend(make_tokenizer(vocabulary), path)
        except ConfigError:
            continue
        if not texts.exists():
            continue
        lines = ids.read_text().split("\n")
        for text, line in zip(texts.read_text().split("\n__ggml_vocab_test__\n"), lines, strict=False):
            expected = [int(number) for number in line.split()]
            assert backend.encode(text, add_special_tokens=False).ids == expected, (path.name, text)
        compared += 1
    assert compared >= 10


def test_ids_are_numbers_in_the_files(tmp_path: Path) -> None:
    folder = texts_of(tmp_path, merged(bos_token_id=-1))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>" and "bos_token" not in config


def test_kimi_cuts_han_from_letters() -> None:
    """Behind letters that they follow, too, which are cut where capitals begin."""
    (pattern,) = CUTTINGS["kimi-k2"].patterns
    split = Split(Regex(pattern), "isolated")
    cut = [word for word, _ in split.pre_tokenize_str("Hallo中文abCd's 1234é漢, x")]
    assert cut == ["Hallo", "中文", "ab", "Cd's", " ", "123", "4", "é", "漢", ",", " x"]


CUTS = {
    "afmoe": ("é 1234567 漢字ab(x", ["é", " ", "1", "234", "567", " ", "漢字", "ab", "(x"]),
    "bailingmoe2": ("It's 12\r\n\n x", ["It", "'s", " ", "1", "2", "\r\n\n", " x"]),
    "exaone-moe": ("two big words 12!/", ["two big words", " ", "1", "2", "!/"]),
    "laguna": ("a! \n\n b", ["a", "!", " ", "\n\n", " b"]),
    "seed-coder": ("a!\n b12", ["a", "!", "\n", " b", "1", "2"]),
    "tiny_aya": ("1234 Ab's", ["1", "234", " Ab's"]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_texts_are_cut_as_the_models_cut_them(pre: str) -> None:
    text, expected = CUTS[pre]
    words = [text]
    for pattern in CUTTINGS[pre].patterns:
        split = Split(Regex(pattern), "isolated")
        words = [word for whole in words for word, _ in split.pre_tokenize_str(whole)]
    assert words == expected
