"""Tokenizer files of strangers: no code of theirs runs, nothing is asked, and damage is an error of one line."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from dummy_tokenizer import byte_level
from typer.testing import CliRunner

from hybrid import LLM
from hybrid.commands.pack import app as pack
from hybrid.errors import ConfigError, HybridError, RequestError
from hybrid.serving import llm as serving
from hybrid.text import convert, tokenizer
from hybrid.text.chat_template import load_template
from hybrid.text.gguf_patterns import TEKKEN
from hybrid.text.tokenizer import load_tokenizer, read_eos_ids
from hybrid.text.tokenizer_backend import backend_errors
from hybrid.weights import companions

EVIL = "open({mark!r}, 'w').write('x')\nclass C: model_type = 'evil'\nT = C\n"
LOAD = """
import sys
from pathlib import Path
from hybrid import LLM
from hybrid.errors import HybridError
from hybrid.text.chat_template import load_template
from hybrid.text.tokenizer import load_tokenizer, read_eos_ids
for path in map(Path, sys.argv[1:]):
    for load in (load_tokenizer, load_template, lambda path: read_eos_ids(path, None), lambda path: LLM(path)):
        try:
            load(path)
        except HybridError as error:
            assert "\\n" not in str(error), error
print(sys.stdin.read(2))
"""


class Pickled:
    """What unpickling this writes is the mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def hostile(path: Path, mark: str, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> Path:
    path.mkdir()
    for name in ("evil", "jinja2", "tokenizers", "transformers", "sitecustomize", "configuration_evil"):
        (path / f"{name}.py").write_text(EVIL.format(mark=mark))
    for name in ("pytorch_model.bin", "tokenizer.pkl", "vocab.pkl", "training_args.bin"):
        (path / name).write_bytes(pickle.dumps(Pickled(mark)))
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


def test_hostile_checkpoints_run_nothing_and_nobody_is_asked(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    mark = str(tmp_path / "ran")
    maps = {
        "auto_map": {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", "evil.T"], "AutoModelForCausalLM": "evil.C"}
    }
    model, slow = {"model_type": "llama", **maps}, {"tokenizer_class": "T", **maps}
    with_file = hostile(tmp_path / "a", mark, model, {**slow, "chat_template": "{{ messages }}"})
    byte_level().save(str(with_file / "tokenizer.json"))
    without = hostile(tmp_path / "b", mark, {**model, "model_type": "evil"}, slow)
    (without / "vocab.json").write_text('{"a": 0}')
    (without / "merges.txt").touch()
    neither = hostile(tmp_path / "c", mark, model, {**slow, "tokenizer_file": "tokenizer.pkl", "auto_map": "evil.T"})
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, with_file, without, neither],
        input="y\n" * 99, capture_output=True, text=True, env=env, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert ran.stdout == "y\n\n" and not ran.stderr
    assert not os.path.exists(mark)


def test_a_model_without_tokenizer_json_names_what_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda module: None)
    for file, package in (("tokenizer.model", "sentencepiece"), ("tiktoken.model", "tiktoken"), ("vocab.json", "")):
        (tmp_path / file).touch()
        with pytest.raises(ConfigError, match=rf"pip install 'hybrid-moe\[convert\]' \(transformers.*{package}"):
            load_tokenizer(tmp_path)
        (tmp_path / file).unlink()


def test_a_store_keeps_what_was_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, when it is packed: then the model runs without what converts."""
    source = write_checkpoint(tmp_path / "model", "llama")
    (source / "tokenizer.model").write_bytes(b"pieces")
    calls: list[Path] = []

    def converted(path: Path) -> bytes:
        calls.append(path)
        return byte_level().to_str().encode()

    monkeypatch.setattr(companions, "convert_tokenizer", converted)
    monkeypatch.setattr(tokenizer, "convert_tokenizer", lambda path: pytest.fail("converted twice"))
    for _ in range(2):
        with LLM(source, cache_dir=tmp_path / "cache") as llm:
            assert llm.tokenizer is not None and llm.tokenizer.encode("ab") == [*b"ab"]
    assert calls == [source]
    os.utime(source / "tokenizer.model", (9, 2**31))
    with LLM(source, cache_dir=tmp_path / "cache") as llm:
        store = llm.engine.store.path
    assert calls == [source, source]
    assert not serving.needs_conversion(store) and load_tokenizer(store) is not None


def test_a_store_without_its_tokenizer_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    (source / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setattr(convert, "find_spec", lambda module: None)
    notices: list[str] = []
    with pytest.raises(ConfigError, match="sentencepiece"):
        LLM(source, cache_dir=tmp_path / "cache", notice=notices.append)
    assert any("the store has no tokenizer.json" in line for line in notices)


def test_mistrals_own_vocabulary_is_read_before_a_model_is_packed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", "llama")
    (source / "tekken.json").write_text("{}")
    result = CliRunner().invoke(pack, ["--input-path", str(source), "--output-path", str(tmp_path / "store")])
    assert result.exit_code == 2
    with pytest.raises(ConfigError, match=r"tekken\.json: the tokenizer in it cannot be used: config\.pattern is None"):
        LLM(source, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "store").exists()
    (source / "tokenizer.json").write_text(byte_level().to_str())
    with LLM(source, cache_dir=tmp_path / "cache") as llm:
        assert llm.tokenizer is not None


WRONG_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = "aB aB 12 ab"


def of_mistral(path: Path, steps: str, config: dict[str, Any], **more: Any) -> Path:
    """A vocabulary of Mistral's size in which a pattern decides whether "aB" is one token. steps: of cutting."""
    content = json.loads(byte_level().to_str())
    split = {"type": "Split", "pattern": {"Regex": WRONG_PATTERN}, "behavior": "Isolated", "invert": False}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"both": {"type": "Sequence", "pretokenizers": [split, whole]}, "one": whole}[steps]
    vocab = content["model"]["vocab"]
    vocab["aB"] = len(vocab)
    content["model"]["merges"] = [["a", "B"]]
    vocab |= {f"filling {index}": len(vocab) + index for index in range(100_001)}
    path.mkdir()
    for name, item in (("tokenizer", content), ("config", config), ("tokenizer_config", more)):
        (path / f"{name}.json").write_text(json.dumps(item))
    return path


def tokens_of_transformers(path: Path) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path).encode(TEXT, add_special_tokens=False)


MISTRAL = {"model_type": "mistral3", "transformers_version": "4.52.4"}


@pytest.mark.parametrize(
    ("config", "more", "steps", "told", "apart"),
    [
        (MISTRAL, {}, "both", True, False),
        (MISTRAL, {"fix_mistral_regex": True}, "both", False, True),
        (MISTRAL, {"fix_mistral_regex": True}, "one", False, True),
        (MISTRAL, {"fix_mistral_regex": False}, "both", False, False),
        ({"model_type": "mistral"}, {}, "both", True, False),
        ({**MISTRAL, "transformers_version": "5.0.0.dev0"}, {}, "both", True, False),
        ({**MISTRAL, "transformers_version": "5.0.0"}, {"fix_mistral_regex": True}, "both", False, False),
        ({**MISTRAL, "model_type": "llama"}, {"fix_mistral_regex": True}, "both", False, False),
    ],
)
def test_patterns_of_mistral_are_corrected_as_transformers_does(
    tmp_path: Path, config: dict[str, Any], more: dict[str, Any], steps: str, told: bool, apart: bool
) -> None:
    """apart: whether "aB" is two words. By default tokens are those of the file, and a line says so."""
    path, lines = of_mistral(tmp_path / "model", steps, config, **more), []
    tokenizer = load_tokenizer(path, None, lines.append)
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)
    assert (tokenizer.token_id("aB") in ids) != apart and tokenizer.decode(ids) == TEXT
    assert len(lines) == told and all('"fix_mistral_regex": true' in line and "\n" not in line for line in lines)
    if find_spec("transformers"):
        assert ids == tokens_of_transformers(path)


def test_a_right_pattern_is_not_told_of(tmp_path: Path) -> None:
    path, lines = of_mistral(tmp_path / "model", "both", MISTRAL), []
    content = json.loads((path / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = TEKKEN
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(path, None, lines.append) is not None and not lines
    (path / "tokenizer_config.json").write_text('{"fix_mistral_regex": "yes"}')
    assert load_tokenizer(path) is not None  # nothing to correct


def test_a_correction_must_be_true_or_false(tmp_path: Path) -> None:
    path = of_mistral(tmp_path / "model", "both", MISTRAL, fix_mistral_regex="yes")
    with pytest.raises(ConfigError, match="fix_mistral_regex is 'yes'; it must be true or false"):
        load_tokenizer(path)


def changed(path: Path, **parts: Any) -> Path:
    content = {**json.loads(byte_level().to_str()), **parts}
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": [part]}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [replace("a", "aa")] * 26}),
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace("", "b")] * 40}]},
        ),
        ("normalizer", replace("a", "b" * 5000)),
        ("normalizer", replace("a?", "b" * 5000, "Regex")),
        ("decoder", {"type": "Sequence", "decoders": [replace("a", "aaa")] * 20}),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000,
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {},
            },
        ),
    ],
)
def test_tokenizers_that_make_gigabytes_are_refused(tmp_path: Path, part: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer\.json: its {part} .*allowed"):
        load_tokenizer(changed(tmp_path, **{part: value}))


def test_normalizers_of_real_models_are_not_refused(tmp_path: Path) -> None:
    usual = [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"), replace(" {2,}", "▁", "Regex"), {"type": "NFKC"}]
    assert load_tokenizer(changed(tmp_path, normalizer={"type": "Sequence", "normalizers": usual})) is not None


def test_what_the_compiled_code_raises_is_one_line(tmp_path: Path) -> None:
    """A plain Exception for a token that is missing; a panic, which is no Exception, for a pattern that backtracks."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[NOPE]"}
    backtracks = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    for parts, text in (({"model": model, "added_tokens": []}, "é"), ({"pre_tokenizer": backtracks}, "a" * 40 + "!")):
        loaded = load_tokenizer(changed(tmp_path, **parts))
        assert loaded is not None
        with pytest.raises(RequestError, match="the tokenizer fails on this text") as error:
            loaded.encode(text)
        assert "\n" not in str(error.value)


def test_interrupts_are_no_errors_of_a_tokenizer() -> None:
    with pytest.raises(KeyboardInterrupt), backend_errors("x", "y", ConfigError):
        raise KeyboardInterrupt


ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 1.5, "", "a", "\0", [], {}, [1], ["a"], {"content": 5}, {"content": ""}, [[[]]],
    {"content": "x", "special": "y"}, {"type": "Replace"}, {"__type": "AddedToken"}, "\ud800", "x" * 5000,
)  # fmt: skip
WHOLE: dict[str, Any] = {
    "tokenizer": {
        **json.loads(byte_level().to_str()),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, replace("x", "y")]},
    },
    "tokenizer_config": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "extra_special_tokens": {"think_token": "<t>"},
        "added_tokens_decoder": {"300": {"content": "<q>", "special": True}},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "{{ bos_token }}"}],
    },
    "special_tokens_map": {"bos_token": {"content": "<s>"}, "additional_special_tokens": ["<a>"]},
    "added_tokens": {"<k>": 301},
    "generation_config": {"eos_token_id": [1, 2]},
}


def mutated(value: Any, choose: random.Random) -> Any:
    """The same with one place changed, anywhere."""
    if isinstance(value, dict | list) and value and choose.random() < 0.8:
        copy = value.copy()
        key = choose.choice([*copy] if isinstance(copy, dict) else range(len(copy)))
        if choose.random() < 0.15:
            del copy[key]
        else:
            copy[key] = mutated(copy[key], choose)
        return copy
    return choose.choice(ODD)


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    for seed in range(250):
        choose = random.Random(seed)
        damaged = choose.choice([*WHOLE])
        for name, content in WHOLE.items():
            written = mutated(content, choose) if name == damaged else content
            if name == "tokenizer_config" and damaged in ("special_tokens_map", "added_tokens"):
                written = {key: value for key, value in written.items() if key != "added_tokens_decoder"}
            (tmp_path / f"{name}.json").write_text(json.dumps(written))
        try:
            loaded = load_tokenizer(tmp_path)
            read_eos_ids(tmp_path, loaded)
            load_template(tmp_path)
            if loaded:
                loaded.decode(loaded.encode("<s>ab x é <a><q>"))
        except HybridError as error:
            assert "\n" not in str(error), seed
