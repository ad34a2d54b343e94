"""Whole steps on a device: torch's CPU device for all but experts, the interpreter for hits, a stand-in for streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import write_checkpoint
from cuda_rig import put
from steps import open_engine, step

pytest.importorskip("triton", reason="triton is not installed: pip install '.[live]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")

from gpu.test_slot_experts import FULL, error, logits  # noqa: E402

from hybrid.config import CacheConfig  # noqa: E402
from hybrid.engine.experts.calibration import measured_rows, time_device  # noqa: E402
from hybrid.engine.experts.runtime import DeviceExperts  # noqa: E402
from hybrid.gpu.slot_experts import StepExperts  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("tests of the interpreter: here is a GPU", allow_module_level=True)


class OnStandIn(StepExperts):
    """Takes the stand-in's memory for a GPU's."""

    results_stay_on_device = False  # torch's CPU device does not wait for what the stand-in has queued

    def __init__(self, plan, memory, address, step) -> None:
        super().__init__(plan, [torch.from_numpy(piece) for piece in memory], address, step)

    def run_looked_up(self, slot_of, first, rows) -> None:
        with torch.inference_mode():  # as where it is asked for, which here is not where it happens
            super().run_looked_up(torch.from_numpy(slot_of), first, rows)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("family", "format", "cache"),
    [
        ("qwen3_moe", "bf16", FULL),
        ("qwen3_moe", "bf16", replace(FULL, strict_placement=True)),
        ("qwen3_moe", "int8", CacheConfig(2, 6, delay=0, poison=True)),
        ("qwen3_moe", "bf16", CacheConfig(2, 6, stream="on", delay=0, poison=True)),
        ("qwen2_moe", "bf16", FULL),
        ("gpt_oss", "bf16", FULL),
        ("deepseek_v2", "bf16", FULL),
    ],
    ids=str,
)
def test_hits_of_a_step_stay_on_the_device(tmp_path, monkeypatch, family, format, cache) -> None:
    path = write_checkpoint(tmp_path / "hf", family)
    with open_engine(path, tmp_path / "cache", weight_format=format) as engine:
        wanted = logits(engine)
    put(monkeypatch, compute=OnStandIn, step_device="cpu")
    with open_engine(path, tmp_path / "cache", weight_format=format, device="cuda", cache=cache) as engine:
        assert engine.device_step is not None
        found = logits(engine)
        calls, hits, *_ = engine.experts.count().sum(axis=0)
        engine.experts.table.check_integrity()
    assert 0.2 < hits / calls < 1
    assert error(found, wanted) < (0.06 if format == "int8" else 0.02)
    left_out = np.abs(found - wanted).max(axis=1)  # a row without its hits would be far off
    assert np.median(left_out) < 0.1 * np.abs(wanted).max()


def test_the_device_finds_what_the_host_finds(tmp_path, monkeypatch) -> None:
    """While copies come and go: slots are looked up in two tables, which must be one."""
    on_device, on_host = [], []

    class Watched(OnStandIn):
        def run_looked_up(self, slot_of, first, rows) -> None:
            super().run_looked_up(slot_of, first, rows)
            on_device.append(self._slot_ids.device[:rows].numpy().copy())

    def share_out(experts, ids, slot_of) -> None:
        before(experts, ids, slot_of)
        if experts.can_launch:
            on_host.append(np.array([slot_of.get(id, -1) for id in ids]).reshape(-1, experts._routes.top_k))

    before = DeviceExperts._share_out
    monkeypatch.setattr(DeviceExperts, "_share_out", share_out)
    put(monkeypatch, compute=Watched, step_device="cpu", seed=4)
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    few = CacheConfig(1, 7, delay=1, poison=True)
    with open_engine(path, tmp_path / "cache", device="cuda", cache=few) as engine:
        for position in range(5):
            step(engine, (0, position, np.array([9 * position])), (1, position, np.array([7])))
        engine.experts.reset()
        step(engine, (0, 0, np.array([3, 5])))
    assert len(on_device) == len(on_host) == 12
    assert all(np.array_equal(*pair) for pair in zip(on_device, on_host, strict=True))
    assert sum((slots >= 0).any() for slots in on_device) > 5 and (on_device[-1] < 0).any()


def test_experts_are_timed_before_the_first_step(tmp_path, monkeypatch) -> None:
    """Their rows and routes come from a step, of which there was none."""
    put(monkeypatch, compute=OnStandIn, step_device="cpu")
    monkeypatch.setattr("hybrid.engine.experts.calibration.ROUNDS", 1)
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    few = {"chunk_size": 4, "cache": CacheConfig(2, 6, delay=0)}
    with open_engine(path, tmp_path / "cache", device="cuda", **few) as engine:
        start, times = time_device(engine.plan, engine.experts.device)
        assert start > 0 and len(times) == len(measured_rows(engine.plan)) == 3
        engine.experts.reprice(engine.experts.costs)
        assert (engine.experts.device.slot_of == -1).all()
