"""Formats that differ from layer to layer, and between the matrices of experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from configs import CONFIGS
from dequantised import write_dequantised
from steps import open_engine, step

from hybrid.config import EngineConfig
from hybrid.errors import ConfigError, WeightsError
from hybrid.formats.mix import MIXES, FormatMix, parse_mix
from hybrid.machine.hardware import probe
from hybrid.machine.rates import Rates
from hybrid.models import model_spec
from hybrid.plan.expert_shape import expert_shape
from hybrid.plan.fit import fit_model
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.manifest import MANIFEST, Manifest
from hybrid.weights.pack import pack
from hybrid.weights.store import Store

FIRST = FormatMix("int4/int8", "int8/bf16", "int8", "bf16", "int8")
SECOND = FormatMix("bf16/int4", "int8", "int4/fp8", "int4", "int8")
MIXED = FormatMix.of_layers([FIRST, SECOND, FIRST])
TOKENS = np.random.default_rng(3).integers(0, 131, 40)


@pytest.mark.parametrize("family", ["qwen2_moe", "llama", "gpt_oss"])
def test_logits_are_those_of_the_weights(tmp_path: Path, family: str) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", family, num_hidden_layers=3))
    pack(checkpoint, tmp_path / "store", MIXED)
    with Store.open(tmp_path / "store", check=True) as store:
        assert store.mix == MIXED
        plain = write_dequantised(tmp_path / "plain", store)
    with open_engine(tmp_path / "store", tmp_path / "cache") as mixed, open_engine(plain, tmp_path / "cache") as exact:
        found, expected = (step(engine, (0, 0, TOKENS)).copy() for engine in (mixed, exact))
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.06


@pytest.mark.parametrize("nodes", [2])
def test_memory_nodes_share_them(tmp_path: Path, nodes: int) -> None:
    """The same bits of every product; only the order in which parts of down are added differs."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", "qwen2_moe", num_hidden_layers=3))
    pack(checkpoint, tmp_path / "store", MIXED)
    logits = []
    for numa in ("off", str(nodes)):
        with open_engine(tmp_path / "store", tmp_path / "cache", numa=numa, threads=2) as engine:
            logits.append(step(engine, (0, 0, TOKENS)).copy())
    assert np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0]) < 0.02


def test_they_are_kept_and_told(tmp_path: Path) -> None:
    assert str(MIXED) == (
        "experts int4/int8, shared int8/bf16, attention bf16, rest int8; "
        "layers 1: experts bf16/int4, dense int4/fp8, attention int4, rest int8"
    )
    Manifest(MIXED, {}, "", {}, {}).write(tmp_path / MANIFEST)
    assert Manifest.read(tmp_path / MANIFEST).mix == MIXED
    assert parse_mix("auto", MIXED) == MIXED and parse_mix("int4", MIXED) == MIXES["int4"]
    assert parse_mix("head=bf16", MIXED).layers[1] == replace(SECOND, head="bf16")
    same = parse_mix("experts=int4,shared=int4,dense=int4,attention=int4,head=int4", MIXED)
    assert same == MIXES["int4"]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format 'int4/int9' of experts is unknown"):
        replace(FIRST, experts="int4/int9")
    with pytest.raises(ConfigError, match="format 'int4/int9' of attention is unknown"):
        replace(FIRST, attention="int4/int9")
    with pytest.raises(ConfigError, match="format 'int4/int8' of head is unknown"):
        replace(FIRST, head="int4/int8")
    with pytest.raises(ConfigError, match="names 2 formats, and there is a layer with 4 such matrices"):
        list(model_spec(CONFIGS["mixtral"]).store_tensors(replace(MIXES["int8"], attention="int4/int8")))
    Manifest(MIXED, {}, "", {}, {}).write(tmp_path / MANIFEST)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace("int4/fp8", "int4/fp9"))
    with pytest.raises(WeightsError):
        Manifest.read(tmp_path / MANIFEST)


def test_one_cache_holds_experts_of_one_format() -> None:
    spec = model_spec({**CONFIGS["mixtral"], "num_hidden_layers": 2})
    for mix in (replace(MIXES["bf16"], experts="int4/int8"), FormatMix.of_layers([MIXES["int4"], MIXES["bf16"]])):
        tensors = {tensor.name: tensor for tensor in spec.store_tensors(mix)}
        with pytest.raises(ConfigError, match="experts (of|have) several (sizes|formats)"):
            expert_shape(spec, tensors)


def test_a_device_takes_one_format(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", "mixtral", num_hidden_layers=3))
    pack(checkpoint, tmp_path / "store", MIXED)
    for choices in ({"device": "simulated", "step_on": "torch-cpu"}, {"device": "simulated", "step_on": "threads"}):
        with pytest.raises(ConfigError, match="experts .*several formats|several sizes"):
            open_engine(tmp_path / "store", tmp_path / "cache", **choices)


@pytest.mark.parametrize("mix", [MIXED, MIXES["q4_k"]], ids=["mixed", "q4_k"])
def test_speeds_are_predicted(mix: FormatMix) -> None:
    spec = model_spec({**CONFIGS["qwen2_moe"], "num_hidden_layers": 3})
    found = fit_model(spec, "auto", mix, probe("avx2"), Rates(1e10, 1e11, 2e11), EngineConfig(device="cpu"))
    assert found.decode_speed > 0 and found.prompt_speed
