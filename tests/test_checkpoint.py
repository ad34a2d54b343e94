"""Checkpoints are read in every form they are published in, and every kind of damage is named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DTYPES, gated, packed, random_tensors, save_with_transformers, write_checkpoint, write_tensors
from configs import APART, CONFIGS, STACKED

from hybrid import LLM
from hybrid.errors import ConfigError, HybridError, WeightsError
from hybrid.formats import FORMATS
from hybrid.models import model_spec
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import model_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_read_bit_for_bit(tmp_path: Path, family: str, dtype: str, shards: int) -> None:
    checkpoint = _open(write_checkpoint(tmp_path, family, dtype=dtype, shards=shards))
    tensors = random_tensors(CONFIGS[family], dtype)
    assert checkpoint.names() == sorted(tensors)
    for name, expected in tensors.items():
        found = checkpoint.read(name)
        expected = expected.astype(np.float32) if expected.dtype == np.int64 else expected
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes() and found.shape == expected.shape


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True])
def test_checkpoints_of_transformers_are_whole(tmp_path: Path, family: str, dtype: str, fused: bool) -> None:
    pytest.importorskip("torch")
    if fused and family in ("granitemoe", "granitemoeshared", "granitemoehybrid"):
        pytest.skip("it is published stacked, under names of its own")
    if fused and family in ("minimax_m3_vl_text", "glm5_next_text", "mimo_v2_flash"):
        pytest.skip("it is published with names that transformers has not")
    if fused and family == "qwen4_exp_text":
        pytest.skip("its tables are published in pieces")
    if family in ("kimi_linear", "bailing_hybrid", "olmo_hybrid"):
        pytest.skip("transformers does not give back the names that it is published with")
    if fused and family in APART:
        pytest.skip("it is published apart, under names of its own")
    model = save_with_transformers(tmp_path, family, dtype=dtype, max_shard_size="100KB", fused=fused)
    checkpoint = _open(tmp_path)
    assert (tmp_path / INDEX).is_file()
    assert checkpoint.form == ("fused" if (checkpoint.spec.moe_layers and fused) or family in STACKED else "apart")
    expected = model.get_input_embeddings().weight.detach().float().numpy()
    assert (checkpoint.read(checkpoint.spec.names.embedding).astype(np.float32) == expected).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_expert_is_the_same_fused_or_apart(tmp_path: Path, family: str) -> None:
    pytest.importorskip("torch")
    for form in (False, True):
        save_with_transformers(tmp_path / str(form), family, fused=form)
    apart, fused = _open(tmp_path / "False"), _open(tmp_path / "True")
    assert (fused.form, apart.form) == ("fused", "apart")
    for one, other in zip(gated(apart, 0, 5), gated(fused, 0, 5), strict=True):
        assert (one.floats(0, one.count) == other.floats(0, other.count)).all()


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    checkpoint = _open(write_checkpoint(tmp_path, "qwen3_moe", fused=True))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert checkpoint.shape(name) == (10, 80, 96)
    whole = checkpoint.read(name).reshape(-1, 96)
    rows = checkpoint.rows(name, 3 * 80, 40).floats(2, 40)
    assert rows.shape == (38, 96) and (rows == whole[242:280]).all()
    alternate = checkpoint.rows(name, 3 * 80 + 1, 40, step=2).floats(2, 40)
    assert alternate.shape == (38, 96) and (alternate == whole[245:320:2]).all()


def test_transposed_experts_are_turned(tmp_path: Path) -> None:
    """[experts, hidden, 2 * intermediate] with gate and up in turn, and [experts, intermediate, hidden]."""
    checkpoint = _open(write_checkpoint(tmp_path, "gpt_oss"))
    tensors = random_tensors(CONFIGS["gpt_oss"])
    both, last = (tensors[f"model.layers.1.mlp.experts.{name}"][4] for name in ("gate_up_proj", "down_proj"))
    assert both.shape == (96, 144) and last.shape == (72, 96)
    gate, up, down = gated(checkpoint, 1, 4)
    for source, expected in ((gate, both[:, 0::2].T), (up, both[:, 1::2].T), (down, last.T)):
        assert (source.count, source.columns) == expected.shape
        assert (source.floats(0, source.count) == expected).all() and (source.floats(16, 30) == expected[16:30]).all()


def test_a_stacked_tensor_that_is_missing_is_the_one_named(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["gpt_oss"])
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
    _refused(write_tensors(tmp_path, CONFIGS["gpt_oss"], tensors), "tensor model.layers.0.mlp.experts.gate_up_proj is")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("change", ["other", "same", "other type"])
def test_a_head_beside_tied_embeddings_is_used_if_it_differs(tmp_path: Path, shards: int, change: str) -> None:
    """As transformers 5 does: a config.json that says they are tied is wrong then."""
    tensors = random_tensors(CONFIGS["qwen3"])
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding.copy()
    if change == "other":
        head[130, 95] += 1
    tensors["lm_head.weight"] = head.astype(np.float32) if change == "other type" else head
    source = write_tensors(tmp_path / "hf", CONFIGS["qwen3"], tensors, shards)
    assert _open(source).spec.tied == (change == "same") == model_spec(model_config(source)).tied
    with packed(source) as store:
        assert store.spec.tied == (change == "same") == ("head" not in store.tensors)
        if change != "same":
            found = FORMATS["bf16"].unpack(store.array("head"), 131, 96)
            assert (found == head.astype(np.float32)).all()


def test_a_head_without_the_embeddings_that_it_is_tied_to_is_both(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["llama"])
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    source = write_tensors(tmp_path / "hf", CONFIGS["llama"], tensors)
    for mix in ("bf16", "bf16,head=int8"):
        with packed(source, mix) as store:
            embedding = FORMATS["bf16"].unpack(store.array("embedding"), 131, 96)
            assert (embedding == tensors["lm_head.weight"].astype(np.float32)).all() and store.spec.tied
        shutil.rmtree(store.path)


def test_a_head_that_differs_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tensors = random_tensors(CONFIGS["llama"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    source = write_tensors(tmp_path / "hf", CONFIGS["llama"], tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = model(torch.tensor([[1, 2, 3]])).logits[0].detach().numpy()
    with LLM(source, threads=1, cache_dir=tmp_path / "cache") as llm:
        found = llm.logits([1, 2, 3])
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def _write(name: str, content: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(content)


def _truncate(size: int) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        with open(path / SINGLE, "r+b") as file:
            file.truncate(size if size >= 0 else (path / SINGLE).stat().st_size + size)

    return damage


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the header of the single file and leave its data."""

    def damage(path: Path) -> None:
        data = (path / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return damage


def _raw_header(length: int, text: bytes) -> Callable[[Path], object]:
    return lambda path: (path / SINGLE).write_bytes(length.to_bytes(8, "little") + text)


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_remove("config.json"), "has no config.json"),
    "config not JSON": (_write("config.json", "{"), "config.json: is not valid JSON"),
    "config not an object": (_write("config.json", "[1]"), "holds a list, not a JSON object"),
    "config not text": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "config nested without end": (_write("config.json", "[" * 100_000), "not valid JSON"),
    "no weights": (_remove(SINGLE), f"has neither {SINGLE} nor {INDEX}"),
    "pytorch weights": (lambda p: (p / SINGLE).rename(p / "pytorch_model.bin"), ".bin files are not read"),
    "empty file": (_truncate(0), "truncated: 0 bytes"),
    "shorter than its length field": (_truncate(5), "truncated: 5 bytes"),
    "cut in the header": (_truncate(100), "header longer than the file"),
    "cut in the data": (_truncate(-1), "is truncated: tensor .* ends at byte"),
    "header length absurd": (_raw_header(1 << 60, b"{}"), "header longer than the file"),
    "header not JSON": (_raw_header(4, b"abcd"), "header that is not JSON"),
    "header not an object": (_raw_header(2, b"[]"), "not a JSON object"),
    "entry not an object": (_header(lambda h: h.update({NORM: 3})), f"malformed header entry for tensor {NORM}"),
    "negative size": (_header(lambda h: h[NORM].update(shape=[-96])), "malformed"),
    "offsets backwards": (_header(lambda h: h[NORM].update(data_offsets=[8, 0])), "malformed"),
    "offsets not numbers": (_header(lambda h: h[NORM].update(data_offsets=["0", "8"])), "malformed"),
    "offsets outside": (_header(lambda h: h[NORM].update(data_offsets=[0, 10**12])), "is truncated: tensor"),
    "overlap": (_header(lambda h: h[NORM].update(data_offsets=[0, 192])), "overlapping tensors"),
    "size against shape": (_header(lambda h: h[NORM].update(shape=[97])), "192 bytes, BF16 \\[97\\] takes 194"),
    "tensor missing": (_header(lambda h: h.pop(NORM)), f"tensor {NORM} is missing"),
    "index without map": (lambda p: (_remove(SINGLE)(p), _write(INDEX, "{}")(p)), "no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_line(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(write_checkpoint(tmp_path, "qwen3_moe"))
    _refused(tmp_path, message)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("model.layers.2.mlp.experts.7.up_proj.weight", None, "experts.7.up_proj.weight is missing"),
        ("lm_head.weight", None, "lm_head.weight is missing"),
        ("model.layers.0.mlp.gate.weight", np.zeros((11, 96), np.float16), r"\[11, 96\].*asks for \[10, 96\]"),
        (
            "model.layers.0.self_attn.q_proj.weight",
            np.zeros((144, 96), np.int8),
            "dtype I8, allowed are BF16, F16, F32",
        ),
        (NORM, np.zeros((96,), np.float64), "dtype F64"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", np.zeros((40, 96), np.float16), r"\[40, 96\]"),
    ],
)
def test_a_tensor_that_does_not_fit_the_config_is_named(
    tmp_path: Path, name: str, changed: np.ndarray | None, message: str
) -> None:
    tensors = random_tensors(CONFIGS["qwen3_moe"])
    del tensors[name]
    if changed is not None:
        tensors[name] = changed
    _refused(write_tensors(tmp_path, CONFIGS["qwen3_moe"], tensors), message)


def test_a_fused_tensor_of_too_few_experts_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["qwen3_moe"], fused=True)
    name = "model.layers.2.mlp.experts.down_proj"
    tensors[name] = tensors[name][:9]
    _refused(write_tensors(tmp_path, CONFIGS["qwen3_moe"], tensors), r"\[9, 96, 40\].*\[10, 96, 40\]")


def test_missing_shards_and_misplaced_tensors_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", shards=3)
    index = json.loads((tmp_path / INDEX).read_text())
    second = tmp_path / "model-00002-of-00003.safetensors"
    others = {"model-00001-of-00003.safetensors", second.name} - {index["weight_map"][NORM]}
    index["weight_map"][NORM] = others.pop()
    (tmp_path / INDEX).write_text(json.dumps(index))
    _refused(tmp_path, f"has no tensor {NORM}")
    second.unlink()
    _refused(tmp_path, "model-00002-of-00003.safetensors: named in .* but missing")


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3])
def test_the_index_may_not_point_elsewhere(tmp_path: Path, file: Any) -> None:
    write_checkpoint(tmp_path, "llama", shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][NORM] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    _refused(tmp_path, "must be a file name without a directory")


def test_a_place_that_is_no_model_directory_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path / "missing", "no such directory")
    _refused(tmp_path, "directory is empty")
    (tmp_path / "file").touch()
    _refused(tmp_path / "file", "is not a directory")


def test_a_bad_config_is_a_config_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    _write("config.json", json.dumps({**CONFIGS["llama"], "model_type": "gpt2"}))(tmp_path)
    with pytest.raises(ConfigError, match="gpt2"):
        Checkpoint.open(tmp_path)


def _open(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(path)
    checkpoint.check()
    return checkpoint


def _refused(path: Path, message: str) -> None:
    with pytest.raises(HybridError, match=message) as error:
        _open(path)
    assert isinstance(error.value, WeightsError)
    assert "\n" not in str(error.value)
