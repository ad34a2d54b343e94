"""What only a GPU can show: real streams, copies and kernels give what the stand-in and the CPU give."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import write_checkpoint
from steps import open_engine, step

from hybrid.config import CacheConfig
from hybrid.machine.gpu import why_unusable

PROBLEM = why_unusable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=f"no usable GPU: {PROBLEM}")]
TOKENS = np.arange(40) * 7 % 131


def logits(engine) -> np.ndarray:
    found = [step(engine, (0, 0, TOKENS[:3])), step(engine, (1, 0, TOKENS)), step(engine, (0, 3, TOKENS[:1]))]
    for slot in (0, 1):
        engine.release(slot)
    return np.concatenate(found)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8", "mxfp4"])
def test_hits_are_near_the_cpu_and_slots_hold_the_bytes_of_the_host(tmp_path, format, strict, pinned) -> None:
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    with open_engine(path, tmp_path / "cache", weight_format=format) as engine:
        wanted = logits(engine)
    cache = CacheConfig("auto", strict_placement=strict, pin_weights=pinned)
    with open_engine(path, tmp_path / "cache", weight_format=format, device="cuda", cache=cache) as engine:
        for _ in range(3):
            found = logits(engine)
            engine.experts.drain()
        assert engine.experts.count()[:, 1].sum() > 0
        assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)
        experts = engine.experts
        for slot, key in ((slot, key) for key, slot in enumerate(experts.table._where) if slot >= 0):
            for memory, piece in zip(experts.device.memory, experts._source(key), strict=True):
                assert np.array_equal(memory[slot].cpu().numpy(), piece)


@pytest.mark.parametrize("strict", [False, True])
def test_the_same_places_give_the_same_bits(tmp_path, strict) -> None:
    path = write_checkpoint(tmp_path / "hf", "gpt_oss")
    cache = CacheConfig("auto", strict_placement=strict)
    with open_engine(path, tmp_path / "cache", device="cuda", cache=cache) as engine:
        logits(engine)
        engine.experts.drain()
        first = logits(engine)
        assert np.array_equal(logits(engine).view(np.uint32), first.view(np.uint32))
