"""GGUF files where models are given: the commands, the Python API, the cache of stores; and damaged files."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_tensors, write_tensors
from configs import CONFIGS
from gguf_rig import write_model
from test_gguf_models import packed, same_stores
from test_gguf_texts import merged
from test_mutations import mutate
from typer.testing import CliRunner

from hybrid import LLM, SamplingParams
from hybrid.commands import fit, pack, run
from hybrid.errors import ConfigError, HybridError, WeightsError
from hybrid.files.gguf import is_gguf
from hybrid.text.gguf_texts import text_files
from hybrid.weights.checkpoints.opening import open_checkpoint
from hybrid.weights.kept import CHANGED, GONE, kept_stores

TEMPLATE = {"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}<|im_start|>"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GGUF file, and in `hf` the same as a Hugging Face directory."""
    folder, texts = tmp_path_factory.mktemp("gguf"), {**merged(), **TEMPLATE}
    config = {**CONFIGS["llama"], "vocab_size": len(texts["tokenizer.ggml.tokens"]), "attention_bias": False}
    tensors = random_tensors(config)
    path = write_model(folder / "model.gguf", config, tensors, texts)
    plain = write_tensors(folder / "hf", config, tensors)
    for name, content in text_files(path).items():
        (plain / name).write_bytes(content)
    return folder


def answers(path: Path, cache: Path) -> tuple[str, str, list[int]]:
    params = SamplingParams(max_tokens=12, temperature=0)
    with LLM(path, cache_dir=cache) as llm:
        assert llm.tokenizer
        said = llm.generate(" hello 12", params)[0]
        return said.text, llm.chat([{"role": "user", "content": "hello"}], params).text, list(said.token_ids)


def test_a_file_and_its_folder_answer_as_the_checkpoint_does(model: Path, tmp_path: Path) -> None:
    expected = answers(model / "hf", tmp_path)
    assert answers(model / "model.gguf", tmp_path) == expected
    assert len(list(tmp_path.glob("model.gguf-*"))) == 1
    assert answers(model, tmp_path) == expected
    assert len(list(tmp_path.glob("*-*"))) == 2  # no third store


def test_commands_take_files(model: Path, tmp_path: Path) -> None:
    path, store = str(model / "model.gguf"), str(tmp_path / "store")
    packed = CliRunner().invoke(pack.app, ["--input-path", path, "--output-path", store])
    assert packed.exit_code == 0 and f"{store}: packed" in packed.stdout
    asked = ["--prompt", "hello", "--max-tokens", "4", "--temperature", "0", "--cache-dir", str(tmp_path / "cache")]
    said = [CliRunner().invoke(run.app, ["--model-path", place, *asked]) for place in (path, store)]
    assert [one.exit_code for one in said] == [0, 0] and said[0].stdout == said[1].stdout
    plan = CliRunner().invoke(run.app, ["--model-path", path, "--dry-run"])
    assert plan.exit_code == 0 and "llama" in plan.stdout
    fits = CliRunner().invoke(fit.app, [path, "--bandwidth", "10GB/s", "--memory", "8GB"])
    assert fits.exit_code == 0 and "llama, 2 layers" in fits.stdout


def test_a_vocabulary_that_is_not_known_is_told(model: Path, tmp_path: Path) -> None:
    texts = merged(pre="later")
    config = {**CONFIGS["llama"], "vocab_size": len(texts["tokenizer.ggml.tokens"]), "attention_bias": False}
    path = write_model(tmp_path / "model.gguf", config, random_tensors(config), texts)
    notes: list[str] = []
    with pytest.raises(ConfigError, match="tokenizer.ggml.pre is 'later', known are"):
        LLM(path, cache_dir=tmp_path / "cache", notice=notes.append)
    assert any("the store has no tokenizer.json" in note for note in notes)


def test_what_the_file_says_of_texts_is_renewed_with_it(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((model / "model.gguf").read_bytes())
    answers(path, tmp_path / "cache")
    (store,) = (tmp_path / "cache").glob("model.gguf-*")
    (store / "tokenizer.json").unlink()
    assert answers(path, tmp_path / "cache") and (store / "tokenizer.json").exists()
    assert (store / "tokenizer.json").stat().st_mtime_ns == path.stat().st_mtime_ns


def test_damaged_models_are_read_or_refused(model: Path, tmp_path: Path) -> None:
    """Header and metadata, down to the shapes of tensors, the configuration and the vocabulary."""
    sound, path = (model / "model.gguf").read_bytes(), tmp_path / "mutant.gguf"
    chance, refused = random.Random(5), 0
    for number in range(150):
        data = bytearray(mutate(sound[:9000], chance) + sound[9000:])
        for _ in range(chance.randint(0, 3)):
            data[chance.randrange(9000)] = chance.choice((0, 1, 2, 3, 9, 127, 255))
        path.write_bytes(data)
        os.utime(path, (number, number))
        try:
            open_checkpoint(path).check()
            text_files(path)
        except HybridError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


def test_types_of_floats(model: Path, tmp_path: Path) -> None:
    """The same values as F32 and as F16 make the same store as BF16 does."""
    config = {**CONFIGS["llama"], "attention_bias": False}
    tensors = {name: (np.round(array.astype("f4") * 64) / 64) for name, array in random_tensors(config).items()}

    stores = [
        packed(write_model(tmp_path / f"{dtype}.gguf", config, {n: a.astype(dtype) for n, a in tensors.items()}))
        for dtype in ("float32", "float16", "bfloat16")
    ]
    assert same_stores(stores[0], stores[1]) and same_stores(stores[0], stores[2])


def test_kept_stores_know_their_files(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((model / "model.gguf").read_bytes())
    answers(path, tmp_path / "cache")
    (found,) = kept_stores(tmp_path / "cache")
    assert not found.useless and found.source == str(path)
    path.write_bytes(path.read_bytes() + bytes(32))
    assert [store.useless for store in kept_stores(tmp_path / "cache")] == [CHANGED]
    path.unlink()
    assert [store.useless for store in kept_stores(tmp_path / "cache")] == [GONE]


def test_more_tokens_than_rows(model: Path, tmp_path: Path) -> None:
    config = {**CONFIGS["llama"], "attention_bias": False}
    path = write_model(tmp_path / "model.gguf", config, random_tensors(config), merged())
    with pytest.raises(WeightsError, match="has 265 tokens and an embedding of 131 rows"):
        open_checkpoint(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.gguf")
    assert not is_gguf(tmp_path / "pipe")
    with pytest.raises(WeightsError, match="is a pipe and no regular file"):
        open_checkpoint(tmp_path / "pipe.gguf")
