"""`hybrid fit` from the header of a GGUF file, or of some of its splits: as exact as what is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_tensors
from gguf_rig import ARCHITECTURES, gguf_metadata, gguf_tensors, write_gguf
from test_fit import run_fit
from test_gguf_models import model, packed, quantised
from test_plan import MACHINE

from hybrid.commands.fit import fits_of, fitter_of, read_model
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError, WeightsError
from hybrid.files.gguf import read_gguf_header
from hybrid.machine.rates import Rates
from hybrid.models import model_spec
from hybrid.weights.checkpoints.gguf import GgufCheckpoint
from hybrid.weights.checkpoints.gguf_outline import outline_gguf
from hybrid.weights.hub import local_model

WIDE = {
    "hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 512, "num_hidden_layers": 4,
    "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip


ODD_LAST = ("qwen3_5_moe_text",)  # whose last layer is none that a published model would have there
ALONE = ("qwen3_next", "qwen3_5_text", "dots1", "laguna")  # whose last layer is the only one of its kind


def tensors_of(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config, tensors = model(family)
    return gguf_metadata(config), gguf_tensors(config, tensors)


def blocks_of(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of sizes that blocks fill, and in types that differ by role and, in the second layer, by layer."""
    config = {**model(family)[0], **WIDE}
    tensors = gguf_tensors(config, random_tensors(config))
    return gguf_metadata(config), {name: quantised(name, array) for name, array in tensors.items()}


def cut(path: Path) -> Path:
    """What a fetch of the header alone leaves."""
    end = read_gguf_header(path).end
    path.write_bytes(path.read_bytes()[:end])
    return path


def splits(folder: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any], first: list[str]) -> list[Path]:
    """Two files, the first with the tensors that are named."""
    counts = {"split.count": 2, "split.tensors.count": len(tensors)}
    second = [name for name in tensors if name not in first]
    return [
        write_gguf(
            folder / f"model-{number + 1:05d}-of-00002.gguf",
            {**(metadata if number == 0 else {}), "split.no": number, **counts},
            {name: tensors[name] for name in names},
        )
        for number, names in enumerate((first, second))
    ]


def without_factors(config: Mapping[str, Any]) -> dict[str, Any]:
    """And without the share that is turned, which Gemma 4 says by factors."""
    turned = config.get("rope_parameters") or {}
    shares = {kind: {**rope, "partial_rotary_factor": None} for kind, rope in turned.items() if isinstance(rope, dict)}
    return {**config, "rope_scaling": None, "rope_parameters": shares or turned}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_header_alone_says_all_but_the_factors_of_a_rope(tmp_path: Path, family: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", *tensors_of(family))
    whole = GgufCheckpoint.open(path)
    header = cut(path).rename(tmp_path / "header.bin")
    outline = outline_gguf(header)
    assert (outline.native, without_factors(outline.config)) == (whole.native, without_factors(whole.config))
    assert model_spec(outline.config) and not outline.notes
    with pytest.raises(WeightsError, match="is truncated"):
        GgufCheckpoint.open(header)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_first_file_shows_what_the_others_hold(tmp_path: Path, family: str) -> None:
    """The last layer is in the second file; what others like it show is not asked of it."""
    metadata, tensors = tensors_of(family)
    whole = GgufCheckpoint.open(write_gguf(tmp_path / "whole.gguf", metadata, tensors))
    last = f"blk.{whole.config['num_hidden_layers'] - 1}."
    here, other = splits(tmp_path, metadata, tensors, [name for name in tensors if not name.startswith(last)])
    cut(other)
    assert outline_gguf(cut(here)).native == whole.native and not outline_gguf(here).notes
    other.unlink()
    outline = outline_gguf(local_model(here, only_config=True))
    assert outline.notes[0].startswith("note: 1 of the model's files are not here; ")
    if family not in ODD_LAST:
        assert without_factors(outline.config) == without_factors(whole.config)
        assert outline.native == (None if family in ALONE else whole.native)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_layers_that_are_not_here_have_indexers(tmp_path: Path, family: str) -> None:
    """Unless those that are have none."""
    metadata, tensors = tensors_of(family)
    metadata["tokenizer.ggml.tokens"] = ["a"] * 131
    two = [name for name in tensors if name.startswith(("blk.0.", "blk.1."))]
    second = family == "deepseek_v32"
    for first, wanted in (([], [True, True, True]), (two, [True, second, True])):
        here, other = splits(tmp_path, metadata, tensors, first)
        other.unlink()
        spec = model_spec(outline_gguf(here).config)
        assert [bool(layer.mixer.indexer) for layer in spec.layers] == wanted  # type: ignore[attr-defined]
        assert spec.max_position == 256
    none = {name: tensor for name, tensor in tensors.items() if ".indexer." not in name}
    here, other = splits(tmp_path, metadata, none, [name for name in two if name in none])
    other.unlink()
    assert model_spec(outline_gguf(here).config).max_position == 200


def test_a_part_of_a_layer_and_types_by_layer(tmp_path: Path) -> None:
    """Layers that are not here have the formats of those that are; the second layer is the odd one."""
    metadata, tensors = blocks_of("mixtral")
    whole = GgufCheckpoint.open(write_gguf(tmp_path / "whole.gguf", metadata, tensors))
    first = [name for name in tensors if not name.startswith(("blk.3.", "blk.2.ffn_down"))]
    here, other = splits(tmp_path, metadata, tensors, first)
    other.unlink()
    outline = outline_gguf(cut(here).rename(tmp_path / "saved"))
    assert outline.native == whole.native and outline.native.layers[1].experts == "mxfp4/q8_0"
    assert [note.split(";")[0] for note in outline.notes][:1] == ["note: 1 of the model's files are not here"]


def fits(path: Path, *formats: str) -> list[dict[str, Any]]:
    config, native, _ = read_model(path)
    fitter = fitter_of(model_spec(config), MACHINE, Rates(80e9), EngineConfig())
    return [fit.to_dict() for fit in fits_of(fitter, native, formats)]


def test_metadata_without_tensors_still_says_what_the_model_is(tmp_path: Path) -> None:
    metadata, tensors = blocks_of("mixtral")
    metadata["tokenizer.ggml.tokens"] = ["a"] * tensors["token_embd.weight"].shape[0]
    here, other = splits(tmp_path, metadata, tensors, [])
    whole = fits(here, "int8", "int4")
    other.unlink()
    assert fits(here) == whole
    assert "so the formats of the file are not known" in outline_gguf(here).notes[0]
    for asked in ("auto", "head=int8"):
        with pytest.raises(ConfigError, match=f"--format {asked} begins with what the model has"):
            fits(here, asked)


def test_bytes_are_those_of_the_types_of_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", *blocks_of("mixtral"))
    with packed(path) as store:
        assert sum(fits(cut(path), "auto")[0]["weight_bytes"].values()) == store.nbytes


def test_the_command_tells_what_is_not_here(tmp_path: Path) -> None:
    metadata, tensors = blocks_of("mixtral")
    here, other = splits(tmp_path, metadata, tensors, [name for name in tensors if not name.startswith("blk.3.")])
    other.unlink()
    shown = run_fit(str(cut(here)), "--memory", "1GB", "--bandwidth", "10GB/s")
    assert shown.returncode == 0 and "note: 1 of the model's files are not here" in shown.stderr


REFUSED = {
    "shape": (lambda tensors: {**tensors, "blk.1.attn_q.weight": tensors["blk.1.attn_k.weight"]}, "has shape"),
    "missing": (lambda tensors: {n: t for n, t in tensors.items() if n != "blk.1.ffn_up_exps.weight"}, "is missing"),
    "further": (lambda tensors: {**tensors, "blk.0.other.weight": tensors["blk.0.attn_k.weight"]}, "has no place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_headers_that_lie_are_refused(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    metadata, tensors = blocks_of("mixtral")
    path = cut(write_gguf(tmp_path / "model.gguf", metadata, change(tensors)))
    with pytest.raises(WeightsError, match=message) as raised:
        outline_gguf(path)
    assert "\n" not in str(raised.value)


def test_a_header_must_be_whole_and_the_first(tmp_path: Path) -> None:
    metadata, tensors = blocks_of("mixtral")
    here, other = splits(tmp_path, metadata, tensors, list(tensors)[:5])
    path = cut(here)
    for length in (3, 30, 300, path.stat().st_size - 1):
        part = tmp_path / "part.gguf"
        part.write_bytes(path.read_bytes()[:length])
        with pytest.raises(WeightsError, match="is no GGUF file|is truncated|more than the file has bytes for"):
            outline_gguf(part)
    here.unlink()
    with pytest.raises(WeightsError, match="00001-of-00002.gguf: missing; it says what the model is"):
        outline_gguf(other)
    with pytest.raises(WeightsError, match="is not the first of 2 files of a model"):
        outline_gguf(other.rename(tmp_path / "second.gguf"))


@pytest.mark.parametrize("count", [1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("family", ["llama", "lfm2", "qwen3_next"])
def test_numbers_of_layers_that_cannot_be(tmp_path: Path, family: str, count: int) -> None:
    metadata, tensors = tensors_of(family)
    key = f"{metadata['general.architecture']}.block_count"
    with pytest.raises(WeightsError, match="block_count|num_hidden_layers"):
        outline_gguf(write_gguf(tmp_path / "model.gguf", {**metadata, key: count}, tensors))
