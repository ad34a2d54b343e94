"""A device mirrors what it has not seen from what the threads keep; torch's CPU device stands in for it."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import write_checkpoint
from steps import open_engine, step

from hybrid.config import EngineConfig
from hybrid.core import SamplingParams
from hybrid.engine.engine import Engine
from hybrid.serving.request import Request
from hybrid.serving.scheduler import Scheduler

torch = pytest.importorskip("torch")
from test_device_step import distance, one_torch_thread  # noqa: E402, F401

STEP = {"step_on": "torch-cpu"}

HOMES = {
    "bf16": ("mixtral", {}),
    "int8": ("mixtral", {"kv_format": "int8"}),
    "fp8": ("mixtral", {"kv_format": "fp8"}),
    "sinks and windows": ("gpt_oss", {}),
    "latents": ("deepseek_v3", {}),
    "latents in int8": ("deepseek_v3", {"kv_format": "int8"}),
    "latents in fp8": ("deepseek_v3", {"kv_format": "fp8"}),
}


@pytest.mark.parametrize("case", HOMES)
def test_what_the_device_has_not_seen_is_mirrored_from_home(tmp_path, case: str) -> None:
    """Of a sequence that was copied, put there, computed without the device, or rewound beyond what its ring has: no
    thread attends to older tokens than those for which there is no place.
    """
    family, choices = HOMES[case]
    path = write_checkpoint(tmp_path / "model", family)
    tokens = np.random.default_rng(5).integers(0, 100, 98).astype(np.int32)
    with open_engine(path, tmp_path / "cache", gpu_kv_tokens=64, chunk_size=32, **STEP, **choices) as engine:
        device, mirror = engine.device_step, engine.device_step.mirror
        rings = [mixer._rings for mixer in device._mixers]

        def goes_on(sequence: int) -> np.ndarray:
            logits = step(engine, (sequence, 96, tokens[96:98]))
            assert (mirror._starts[sequence], mirror._ends[sequence]) == (34, 98)
            return logits

        def mirrored(sequence: int) -> list[torch.Tensor]:
            return [part[sequence].clone() for ring in rings for part in ring.read(slice(None), 64)]

        for first in range(0, 96, 32):
            step(engine, (0, first, tokens[first : first + 32]))
        logits, computed = goes_on(0), mirrored(0)
        engine.copy(0, 1, 96)
        engine.kv.load(engine.kv.save(0, 0, 96), 2, 0, 96)
        engine.copy(0, 3, 96)
        step(engine, (3, 10, tokens[10:11]))
        for sequence in (1, 2, 3):
            assert distance(goes_on(sequence), logits) < (0.03 if choices else 1e-6)
            for part, known in zip(mirrored(sequence), computed, strict=True):
                assert torch.equal(part, known) if not choices else distance(part.float(), known.float()) < 0.05
        assert mirror.missing(3, 98, 1) == (35, 35)


def test_a_prompt_that_is_taken_over_is_mirrored(tmp_path) -> None:
    """By the scheduler, from the pool."""
    with Engine.open(EngineConfig(threads=2, max_batch=4, chunk_size=64, max_seq_len=512, **STEP)) as engine:
        scheduler, prompt = Scheduler(engine), [10, *range(20, 120)]
        for _ in range(2):
            entry = Request(np.array(prompt, np.int32), SamplingParams(max_tokens=2), keep=True)
            scheduler.add(entry)
            while scheduler.has_work:
                scheduler.step()
            while scheduler._kept.pop_oldest():
                engine.release(0)
        assert entry.completion.cached_tokens == 96 and engine.device_step.mirror._starts[0] == 0
        assert not any(engine.device_step._inputs.older.values())
