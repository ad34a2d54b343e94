"""The model of the seeds' machine is fitted to what they measured without a cache."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

from seed_geometries import SEEDS, made_up_calls, table  # noqa: E402


@pytest.mark.parametrize("reuse", [0.4, 0.6])
def test_tokens_share_as_many_experts_as_asked(reuse: float) -> None:
    calls = made_up_calls(8, reuse, tokens=400)
    chosen = calls.expert.reshape(400, 32, 2)
    shared = (chosen[1:, :, :, None] == chosen[:-1, :, None, :]).any(axis=3).mean()
    assert shared == pytest.approx(reuse, abs=0.02)
    assert (chosen[..., 0] != chosen[..., 1]).all() and np.bincount(calls.expert).min() > 0.9 * calls.total / 8


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: seed.name)
def test_the_table_has_the_measured_speed_of_the_cpu(seed) -> None:
    lines = table(seed, [0.5], tokens=100)
    assert lines[-1] == f"| CPU alone | {seed.cpu_speed} |" and len(lines) == 8
