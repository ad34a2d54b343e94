"""Tokens that only the files beside tokenizer.json know: equal to `transformers`, and damaged ones are named."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from dummy_tokenizer import byte_level

from hybrid.errors import HybridError
from hybrid.text.chat_template import load_template
from hybrid.text.special_tokens import read_special_tokens
from hybrid.text.tokenizer import Tokenizer, load_tokenizer, read_eos_ids

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
TEXTS = ("<s>", "<end>", "<think>", "<tool>", "<pad>", "a", "<|eot|>")
PROMPT = "a <s>b<end> <think>c <tool>a<pad> <|eot|>d"
USER = [{"role": "user", "content": "x"}]
TEMPLATE = "|".join(f"{{{{ {name} }}}}" for name in (*NAMES, "think_token", "image_token"))


def write(path: Path, **files: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    byte_level().save(str(path / "tokenizer.json"))
    for name, content in {"config": {"model_type": "llama"}, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def loaded(path: Path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    return tokenizer


def token(choose: random.Random, typed: bool) -> Any:
    text = choose.choice(TEXTS)
    if choose.random() < 0.6:
        return text
    flags = {flag: choose.random() < 0.3 for flag in ("lstrip", "rstrip", "normalized")}
    return {"content": text, **flags, "single_word": False} | ({"__type": "AddedToken"} if typed else {})


def combinations(choose: random.Random) -> Iterator[tuple[str, Any]]:
    """Files as one of many ways to write them down may have them."""
    end = byte_level().get_vocab_size()

    def some(items: tuple[str, ...]) -> list[str]:
        return choose.sample(items, choose.randint(0, 3))

    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    config |= {name: token(choose, True) for name in NAMES if choose.random() < 0.4}
    for name, value in (
        ("image_token", choose.choice(TEXTS)),
        ("additional_special_tokens", [token(choose, True) for _ in range(2)]),
        ("extra_special_tokens", choose.choice(([token(choose, True)], {"think_token": "<think>"}))),
        ("added_tokens_decoder", {str(end + i): {"content": text, "special": choose.random() < 0.5}
                                  for i, text in enumerate(some(TEXTS[2:]))}),
    ):  # fmt: skip
        if choose.random() < 0.3:
            config[name] = value
    yield "tokenizer_config", config
    if choose.random() < 0.5:
        names = {name: token(choose, False) for name in NAMES if choose.random() < 0.4}
        yield (
            "special_tokens_map",
            names | ({"additional_special_tokens": some(TEXTS)} if choose.random() < 0.5 else {}),
        )
    if choose.random() < 0.5:
        yield "added_tokens", {text: end + i for i, text in enumerate(some(TEXTS[2:]))}


def test_many_ways_to_write_them_down_are_read_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    for seed in range(16):
        path = write(tmp_path / str(seed), **dict(combinations(random.Random(seed))))
        oracle, ours = transformers.AutoTokenizer.from_pretrained(path), loaded(path)
        ids = oracle(PROMPT)["input_ids"]
        assert ours.encode(PROMPT) == ids, path
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert (ours.bos_id, [*ours.eos_ids]) == (
            oracle.bos_token_id,
            [] if oracle.eos_token_id is None else [oracle.eos_token_id],
        )
        template = load_template(path)
        assert template and template.render(USER) == oracle.apply_chat_template(USER, tokenize=False)


def test_each_file_gives_tokens(tmp_path: Path) -> None:
    """Markers stay whole, and who ends a text is known, wherever it is written."""
    end = byte_level().get_vocab_size()
    for name, files in {
        "by id": {"tokenizer_config": {"added_tokens_decoder": {str(end): {"content": "<s>", "special": True}}}},
        "by text": {"added_tokens": {"<s>": end}},
        "map": {"special_tokens_map": {"bos_token": {"content": "<s>"}}},
        "name": {"tokenizer_config": {"bos_token": "<s>"}},
        "extra": {"tokenizer_config": {"extra_special_tokens": ["<s>"]}},
        "older": {"tokenizer_config": {"additional_special_tokens": ["<s>"]}},
        "own": {"tokenizer_config": {"extra_special_tokens": {"start_token": "<s>"}}},
        "older in the map": {"special_tokens_map": {"additional_special_tokens": ["<s>"]}},
    }.items():
        assert loaded(write(tmp_path / name, **files)).encode("<s>a") == [end, *b"a"], name
    known = write(tmp_path / "eos", special_tokens_map={"eos_token": "<end>"})
    assert read_eos_ids(known, loaded(known)) == {256}


def test_names_that_no_file_gives_are_those_of_the_class(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    path = write(
        tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizerFast", "chat_template": "{{ eos_token }}"}
    )
    backend.save(str(path / "tokenizer.json"))
    tokenizer, template = loaded(path), load_template(path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, {1})
    assert template and template.render(USER) == "</s>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config", {"added_tokens_decoder": [1]}),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {"content": 5}}}),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}),
        ("added_tokens", {"a": "b"}),
        ("added_tokens", {"a": -1}),
        ("special_tokens_map", [1]),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: Any) -> None:
    with pytest.raises(HybridError, match=rf"{name}\.json"):
        read_special_tokens(write(tmp_path, **{name: content}))


def test_a_bos_that_the_checkpoint_asks_for_begins_raw_prompts_alone(tmp_path: Path) -> None:
    asks = {"bos_token": "<end>", "add_bos_token": True}
    tokenizer = loaded(write(tmp_path, tokenizer_config=asks))
    assert tokenizer.encode("a") == [256, *b"a"] == tokenizer.encode("<end>a")
    assert tokenizer.encode("a", special_tokens=False) == [*b"a"]
    for other in ({**asks, "add_bos_token": False}, {**asks, "bos_token": None}, {"add_bos_token": True}):
        assert loaded(write(tmp_path, tokenizer_config=other)).encode("a") == [*b"a"]
