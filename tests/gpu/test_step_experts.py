"""Whole steps on a device: torch's CPU device for all but experts, the interpreter for hits, a stand-in for streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import write_checkpoint
from cuda_rig import put
from steps import open_engine

pytest.importorskip("triton", reason="triton is not installed: pip install '.[test]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[test]'")

from gpu.test_slot_experts import FULL, error, logits  # noqa: E402

from hybrid.config import CacheConfig  # noqa: E402
from hybrid.gpu.slot_experts import StepExperts  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("tests of the interpreter: here is a GPU", allow_module_level=True)


class OnStandIn(StepExperts):
    """Takes the stand-in's memory for a GPU's."""

    def __init__(self, plan, memory, address, step) -> None:
        super().__init__(plan, [torch.from_numpy(piece) for piece in memory], address, step)


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
