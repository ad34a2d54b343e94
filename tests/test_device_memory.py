"""The plan of a device's memory: every part is what will be there, and what does not fit is said with numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
from checkpoints import write_checkpoint
from configs import ON_DEVICE
from steps import open_engine
from test_plan import plan_of, spec_of

from hybrid.config import CacheConfig, DeviceConfig
from hybrid.errors import CapacityError, ConfigError, DeviceFailed
from hybrid.formats.mix import FormatMix, parse_mix
from hybrid.models.layers.base import Extents
from hybrid.plan.gpu_memory import KV_SHARE, device_weight_bytes, plan_device, token_bytes
from hybrid.plan.plan import Plan

SIZES = Extents(rows=64, sequences=4, tokens=1000)
BF16 = FormatMix.uniform("bf16")
STEP = {"step_on": "torch-cpu"}


def planned(free: int, kv_tokens: int | None = None, family: str = "qwen3_moe"):
    return plan_device(spec_of(family), BF16, free, SIZES, kv_tokens, "cuda")


@pytest.mark.parametrize("text", ["bf16", "int8", "fp8,head=int4"])
@pytest.mark.parametrize("family", ON_DEVICE)
def test_weights_are_those_that_the_device_gets(tmp_path, family, text) -> None:
    pytest.importorskip("torch")
    path = write_checkpoint(tmp_path / "hf", family)
    with open_engine(path, tmp_path / "cache", weight_format=text, **STEP) as engine:
        weights = engine.device_step._weights
        assert engine.plan.device.weights == sum(tensor.nbytes for tensor in tensors(weights))
        rings = [mixer._rings for mixer in engine.device_step._mixers if hasattr(mixer, "_rings")]
        assert engine.plan.device.kv == sum(ring.nbytes for ring in rings) > 0


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        ("OutOfMemoryError", CapacityError, r"the device has no room for .*B of weights and .*B of keys"),
        ("RuntimeError", DeviceFailed, r"the device cannot be used \(CUDA error: busy\); use --device cpu"),
    ],
)
def test_a_device_that_cannot_be_opened_says_why(tmp_path, monkeypatch, raised, kind, words) -> None:
    torch = pytest.importorskip("torch")
    errors = {"OutOfMemoryError": torch.OutOfMemoryError, "RuntimeError": RuntimeError}

    def fail(*_: Any) -> None:
        raise errors[raised]("CUDA error: busy\nmore lines")

    monkeypatch.setattr("hybrid.gpu.opening.load_weights", fail)
    path = write_checkpoint(tmp_path / "hf", "llama")
    with pytest.raises(kind, match=words), open_engine(path, tmp_path / "cache", **STEP):
        pass


def tensors(found: Any) -> list[Any]:
    """Every tensor once."""
    if is_dataclass(found):
        found = [getattr(found, field.name) for field in fields(found)]
    if isinstance(found, list | tuple):
        return list({id(tensor): tensor for part in found for tensor in tensors(part)}.values())
    return [] if found is None else [found]


def test_the_mirror_takes_a_fourth_of_what_is_left_and_the_slots_the_rest() -> None:
    each = SIZES.sequences * token_bytes(spec_of(), BF16)
    fixed = planned(10**9)
    fixed_bytes = fixed.weights + fixed.workspace
    device = planned(fixed_bytes + KV_SHARE * 300 * each)
    assert device.kv_tokens == 256 and device.kv == 256 * each
    assert device.left == KV_SHARE * 300 * each - device.kv
    assert fixed.kv_tokens == 1024  # no more than a sequence, in whole steps


def test_the_mirror_holds_the_rows_of_a_step_however_little_is_left() -> None:
    least = planned(10**9, 64)
    assert planned(least.used).kv_tokens == 64
    with pytest.raises(ConfigError, match="free; weights take .* and 64 mirrored tokens of 4 sequences"):
        planned(least.used - 1)
    with pytest.raises(ConfigError, match="512 mirrored tokens"):
        planned(least.used, 512)


def with_slots(memory: float) -> Plan:
    return plan_of(
        device="simulated", simulated=DeviceConfig(memory_gb=memory / 1e9), cache=CacheConfig("auto", stream="off"),
        chunk_size=64, max_batch=4, max_seq_len=256, gpu_kv_tokens=64, **STEP,
    )  # fmt: skip


@pytest.mark.parametrize(("room", "geometry"), [(5.5, (1, 5)), (16.1, (2, 8)), (500, (2, 10))])
def test_auto_fills_what_attention_and_keys_leave_with_slots(room, geometry) -> None:
    """The model has two MoE layers of ten experts."""
    device = with_slots(1e9).device
    plan = with_slots(device.used - device.slots + room * with_slots(1e9).cache.slot_bytes)
    assert (plan.cache.geometry.nblocks, plan.cache.geometry.nways) == geometry
    assert plan.device.slots == plan.cache.nbytes and plan.device.left >= 0


def test_the_host_needs_what_stands_in_for_a_device() -> None:
    plain, stood = plan_of(), plan_of(**STEP)
    assert stood.fixed_bytes - stood.arena_bytes == plain.fixed_bytes - plain.arena_bytes + stood.device.stand_in_bytes
    assert stood.device.stand_in_bytes == stood.device.used


def test_a_tied_head_of_bf16_is_there_once() -> None:
    tied, apart = (spec_of("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert device_weight_bytes(apart, BF16) - device_weight_bytes(tied, BF16) == 131 * 96 * 2
    mix = parse_mix("bf16,head=int8", BF16)
    assert device_weight_bytes(tied, mix) == device_weight_bytes(apart, mix)


def test_a_dry_run_shows_the_device_and_needs_no_torch() -> None:
    """For whoever has no GPU, and for a device that is described."""
    code = "import sys; sys.modules['torch'] = None; from hybrid.commands.run import app; app()"
    flags = [
        "--device",
        "simulated",
        "--step-on",
        "torch-cpu",
        "--device-memory-gb",
        "0.04",
        "--max-seq-len",
        "512",
        "--dry-run",
    ]
    run = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for words in ("memory of the device:", "weights but those of experts, in bf16", "workspace", "slots of experts"):
        assert words in run.stdout
    assert "indexes of" in run.stdout  # what auto gives
    run = subprocess.run([sys.executable, "-c", code, *flags, "--json"], capture_output=True, text=True)
    device = json.loads(run.stdout)["device"]
    assert device["free"] == 40_000_000 and device["slots"] > 0


def test_experts_of_an_activation_that_no_device_knows_are_refused() -> None:
    spec = spec_of("mixtral")
    experts = replace(spec.layers[1].feed_forward, activation="gelu_tanh")
    spec = replace(spec, layers=(spec.layers[0], replace(spec.layers[1], feed_forward=experts)))
    with pytest.raises(ConfigError, match=r"layer 1 of model_type 'mixtral' .* \(FeedForward\); use --step-on threads"):
        plan_device(spec, BF16, 10**9, SIZES, None, "cuda")
