"""Whole steps whose hits the Triton kernels compute, in the interpreter, over the memory of the stand-in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from cuda_rig import put
from steps import greedy, open_engine, step

pytest.importorskip("triton", reason="triton is not installed: pip install '.[live]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")

from hybrid.config import CacheConfig  # noqa: E402
from hybrid.engine.engine import Engine  # noqa: E402
from hybrid.engine.experts.slot_program import SlotProgram  # noqa: E402
from hybrid.formats.rows import row_stride  # noqa: E402
from hybrid.gpu.slot_experts import SlotExperts  # noqa: E402
from hybrid.machine.memory import view  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("tests of the interpreter: here is a GPU", allow_module_level=True)

FULL = CacheConfig("auto", delay=0, poison=True)  # room for every expert
TOKENS = np.arange(20) * 7 % 131


class OnStandIn(SlotExperts):
    """Takes the stand-in's memory for a GPU's."""

    def __init__(self, plan, memory, address) -> None:
        super().__init__(plan, [torch.from_numpy(piece) for piece in memory], address)


def logits(engine: Engine) -> np.ndarray:
    """Of few rows and of many, twice: the second time with hits alone where every expert fits."""
    found = [step(engine, (0, 0, TOKENS[:3])), step(engine, (1, 0, TOKENS)), step(engine, (0, 0, TOKENS[:3]))]
    for slot in (0, 1):
        engine.release(slot)
    return np.concatenate(found)


def run(path: Path, tmp_path: Path, cache: CacheConfig | None, **choices) -> tuple[np.ndarray, float]:
    """Logits, and the hit rate."""
    device = {} if cache is None else {"device": "cuda", "cache": cache}
    with open_engine(path, tmp_path / "cache", **device, **choices) as engine:
        found = logits(engine)
        counts = engine.experts.count().sum(axis=0) if engine.experts else np.ones(2)
        return found, counts[1] / counts[0]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_hits_on_the_kernels_are_near_the_cpu(tmp_path, monkeypatch, family, strict) -> None:
    put(monkeypatch, compute=OnStandIn)
    path = write_checkpoint(tmp_path / "hf", family)
    wanted, _ = run(path, tmp_path, None)
    found, hits = run(path, tmp_path, replace(FULL, strict_placement=strict))
    assert 0.3 < hits < 1
    assert error(found, wanted) < 0.02  # activations that the interpreter cuts off to bf16


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_every_format_is_computed_on_the_device(tmp_path, monkeypatch, format) -> None:
    put(monkeypatch, compute=OnStandIn)
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    wanted, _ = run(path, tmp_path, None, weight_format=format)
    found, hits = run(path, tmp_path, FULL, weight_format=format)
    assert hits > 0.3
    assert error(found, wanted) < 0.06  # int8 activations on the CPU, bf16 on the device


def test_the_same_places_give_the_same_bits_whatever_the_geometry(tmp_path, monkeypatch) -> None:
    """Strictly: a fixed set of experts on the device, in other slots, indexes and orders of copies."""
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    warm = tmp_path / "warm.json"
    put(monkeypatch, compute=OnStandIn)
    with open_engine(path, tmp_path / "cache", device="cuda", cache=CacheConfig(2, 6, delay=0)) as engine:
        greedy(engine, TOKENS[:5], 5, count=4)
        engine.save_experts(warm)
    strict = CacheConfig(1, 20, quota=0, warm=warm, strict_placement=True)
    one, hits = run(path, tmp_path, strict)
    put(monkeypatch, compute=OnStandIn, seed=9)
    other, same_hits = run(path, tmp_path, replace(strict, nblocks=2, nways=10, policy="LFU"))
    assert 0.1 < hits == same_hits < 1
    assert np.array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_streamed_expert_has_the_bits_of_a_hit(tmp_path, monkeypatch, family, strict) -> None:
    """A prompt with every expert in a slot of its own, with one there and the others streamed, and with all streamed
    from pinned memory.
    """
    put(monkeypatch, compute=OnStandIn)
    path = write_checkpoint(tmp_path / "hf", family)
    full = replace(FULL, stream="off", strict_placement=strict)
    with open_engine(path, tmp_path / "cache", device="cuda", cache=full) as engine:
        logits(engine)
        wanted = step(engine, (1, 0, TOKENS))
        assert engine.experts.device.times.streamed == 0
    for quota, pinned in ((None, False), (0, True)):
        one = CacheConfig(1, 1, quota, stream="on", delay=0, poison=True, pin_weights=pinned, strict_placement=strict)
        with open_engine(path, tmp_path / "cache", device="cuda", cache=one) as engine:
            found = step(engine, (1, 0, TOKENS)), step(engine, (2, 0, TOKENS))
            assert engine.experts.device.times.streamed > 10
        assert all(np.array_equal(logits.view(np.uint32), wanted.view(np.uint32)) for logits in found)


class Exact(OnStandIn):
    """Experts with the bits of the CPU, so that only the order of sums can make a difference."""

    def __init__(self, plan, memory, address) -> None:
        super().__init__(plan, memory, address)
        self._program = SlotProgram(plan, memory, address)
        self.top_k, self.contributions = self._kernels.top_k, torch.zeros_like(self._kernels.contributions)
        self._kernels = self

    def run(self, x, slot_ids) -> None:
        self._program(slot_ids.numpy())
        ours = np.flatnonzero(slot_ids.numpy().reshape(-1) >= 0)
        self.contributions[ours] = torch.from_numpy(self._contributions[ours])
        self._contributions[ours] = -0.0


def residual(path: Path, tmp_path: Path, cache: CacheConfig | None) -> np.ndarray:
    """The residual stream of the last rows, before rounding to bf16 hides the last bits."""
    device = {} if cache is None else {"device": "cuda", "cache": cache, "step_on": "threads"}
    with open_engine(path, tmp_path / "cache", **device) as engine:
        logits(engine)
        assert cache is None or 0.1 < engine.experts.count()[:, 1].sum() / engine.experts.count()[:, 0].sum() < 0.9
        return view(engine.addresses.buffer("residual"), (3, row_stride(engine.spec.hidden)), np.uint32).copy()


def test_strictly_the_order_of_a_sum_does_not_depend_on_places(tmp_path, monkeypatch) -> None:
    put(monkeypatch, compute=Exact)
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    few = CacheConfig(2, 4, delay=0, poison=True)
    wanted, usual = (residual(path, tmp_path, cache) for cache in (None, few))
    assert np.array_equal(residual(path, tmp_path, replace(few, strict_placement=True)), wanted)
    assert not np.array_equal(usual, wanted)
    assert error(usual.view(np.float32), wanted.view(np.float32)) < 1e-6
