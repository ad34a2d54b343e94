"""The probes of `hybrid bench` run on every instruction set and answer with a speed."""

from __future__ import annotations

import numpy as np
import pytest
from rig import aligned

import cpu_kernels


@pytest.mark.parametrize("threads", [1, 2])
def test_probes_answer_with_a_finite_speed(isa, threads) -> None:
    pool, memory = cpu_kernels.ThreadPool(threads, []), aligned(1 << 16, np.uint8)
    assert 0 < cpu_kernels.read_bandwidth(pool, isa, memory.ctypes.data, memory.size) < float("inf")
    assert 0 < cpu_kernels.peak_flops(pool, isa, 1000) < float("inf")
    assert 0 < cpu_kernels.peak_int_ops(pool, isa, 1000) < float("inf")
