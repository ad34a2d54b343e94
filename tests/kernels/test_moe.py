"""Rows are sorted by expert exactly; gate, up and down are within rounding whatever the routing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import FP32, Near, assert_near, product, silu_times
from rig import BF16, ISAS, Rig, aligned, padded, placed, random_bf16

import cpu_kernels
from hybrid.program import pairs, row_stride
from hybrid.weights.layout import BLOCK, down_offset, pack_expert


@dataclass
class Experts:
    """Random experts: gate and up [experts, intermediate, hidden], down [experts, hidden, intermediate]."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray

    @classmethod
    def make(cls, count: int, hidden: int, intermediate: int, seed: int = 0) -> Experts:
        random = np.random.default_rng(seed)
        shapes = [(count, intermediate, hidden)] * 2 + [(count, hidden, intermediate)]
        return cls(*(random_bf16(random, *shape) for shape in shapes))

    @property
    def packed(self) -> np.ndarray:
        return placed(np.stack([pack_expert(*parts) for parts in zip(self.gate, self.up, self.down, strict=True)]))


@dataclass
class Routed:
    """What the three ops of a step left behind."""

    offsets: np.ndarray
    rows: np.ndarray
    weights: np.ndarray
    active: np.ndarray
    activation: np.ndarray  # [rows * top_k, intermediate], in routing order
    output: np.ndarray  # [rows, hidden]


def run(isa, experts: Experts, x, ids, weights, onto, *, threads=1) -> Routed:
    """ids and weights [rows, top_k], or None: one expert takes every row."""
    count, intermediate, hidden = experts.gate.shape
    rows, top_k = ids.shape if ids is not None else (len(x), 1)
    act_stride, stride = row_stride(intermediate), row_stride(hidden)
    integers = {name: aligned(n, np.int32, -7) for name, n in _sizes(count, rows * top_k).items()}
    gates = aligned(rows * top_k, np.float32)
    activation = aligned((rows * top_k, act_stride), BF16)
    output = aligned((rows, stride), np.float32)
    output[:, :hidden] = onto
    routing = cpu_kernels.Routing(
        weights=gates.ctypes.data, **{name: array.ctypes.data for name, array in integers.items()}
    )
    blob = experts.packed
    rig = Rig(isa, threads)
    rig.add("group", ids=ids, weights=weights, routing=routing, experts=count, top_k=top_k)
    shape = {"routing": routing, "expert_stride": blob[0].nbytes}
    rig.add(
        "gate_up",
        **shape,
        input=padded(x),
        experts=blob,
        output=activation,
        blocks=-(-intermediate // BLOCK),
        pairs=pairs(hidden),
        input_stride=stride,
        output_stride=act_stride,
    )
    rig.add(
        "down",
        **shape,
        input=activation,
        experts=blob.ctypes.data + 2 * down_offset(hidden, intermediate),
        output=output,
        blocks=-(-hidden // BLOCK),
        pairs=pairs(intermediate),
        input_stride=act_stride,
        output_stride=stride,
    )
    rig.run(rows)
    assert not activation[:, intermediate:].any() and not output[:, hidden:].any()
    active = integers["active"][: integers["count"][0]]
    return Routed(
        integers["offsets"], integers["rows"], gates, active, activation[:, :intermediate], output[:, :hidden]
    )


def _sizes(experts: int, entries: int) -> dict[str, int]:
    return {"offsets": experts + 1, "rows": entries, "active": experts, "count": 1}


def check(routed: Routed, experts: Experts, x, ids, weights, onto) -> None:
    """Every op against the reference on what the op before it really left."""
    if ids is None:
        ids, weights = np.zeros((len(x), 1), np.int32), np.ones((len(x), 1), np.float32)
    top_k = ids.shape[1]
    order = np.argsort(ids.reshape(-1), kind="stable")
    counts = np.bincount(ids.reshape(-1), minlength=len(experts.gate))
    assert np.array_equal(routed.offsets, [0, *np.cumsum(counts)])
    assert np.array_equal(routed.active, np.flatnonzero(counts))
    assert np.array_equal(routed.rows, order // top_k)
    assert np.array_equal(routed.weights, weights.reshape(-1)[order])

    output = Near(np.array(onto, np.float64), np.zeros(onto.shape))
    for expert in routed.active:
        part = slice(*routed.offsets[expert : expert + 2])
        rows = routed.rows[part]
        gate, up = (product(x[rows], matrix[expert]) for matrix in (experts.gate, experts.up))
        assert_near(routed.activation[part], silu_times(gate, up).as_bf16())
        down, scale = product(routed.activation[part], experts.down[expert]), routed.weights[part, None]
        output.value[rows] += scale * down.value
        output.bound[rows] += np.abs(scale) * down.bound + 4 * FP32 * (
            np.abs(scale * down.value) + np.abs(output.value[rows])
        )
    assert_near(routed.output, output)


def try_routing(isa, ids, *, rows=None, sizes=(90, 40), experts=10, threads=1) -> None:
    random = np.random.default_rng(3)
    hidden, intermediate = sizes
    weights = None
    if ids is not None:
        ids = np.ascontiguousarray(ids, np.int32)
        rows, weights = len(ids), random.random(ids.shape).astype(np.float32)
    made = Experts.make(experts, hidden, intermediate)
    x = (random.standard_normal((rows, hidden)) / np.sqrt(hidden)).astype(BF16)
    onto = random.standard_normal((rows, hidden)).astype(np.float32)
    check(run(isa, made, x, ids, weights, onto, threads=threads), made, x, ids, weights, onto)


def choose(rows: int, top_k: int, experts: int, seed: int = 0) -> np.ndarray:
    """Different experts for every row."""
    random = np.random.default_rng(seed)
    return np.array([random.permutation(experts)[:top_k] for _ in range(rows)])


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_random_routing(isa, rows, top_k) -> None:
    try_routing(isa, choose(rows, top_k, 10))


@pytest.mark.parametrize("rows", [1, 6, 50])
def test_one_expert_takes_every_row_and_others_none(isa, rows) -> None:
    try_routing(isa, [[7]] * rows)
    try_routing(isa, [[9, 0]] * rows)


def test_an_expert_with_one_row_beside_one_with_many(isa) -> None:
    try_routing(isa, [[4, 2]] + [[2, 8]] * 40, threads=3)


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("sizes", [(32, 16), (90, 40), (300, 203), (40, 600), (700, 40)])
def test_a_dense_layer_is_one_expert_of_weight_one(isa, rows, sizes) -> None:
    try_routing(isa, None, rows=rows, sizes=sizes, experts=1, threads=2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 20),
    experts=st.integers(4, 9),
    top_k=st.integers(1, 4),
    hidden=st.integers(1, 100),
    intermediate=st.integers(1, 60),
    threads=st.integers(1, 3),
)
def test_any_size_and_number_of_threads(rows, experts, top_k, hidden, intermediate, threads) -> None:
    for isa in ISAS:
        ids = choose(rows, top_k, experts, rows)
        try_routing(isa, ids, sizes=(hidden, intermediate), experts=experts, threads=threads)


def test_a_row_is_the_same_alone_and_among_others_and_on_any_number_of_threads(isa) -> None:
    random = np.random.default_rng(5)
    experts, ids = Experts.make(10, 300, 40), choose(33, 3, 10).astype(np.int32)
    weights = random.random(ids.shape).astype(np.float32)
    x, onto = random_bf16(random, 33, 300), random.standard_normal((33, 300)).astype(np.float32)
    together = run(isa, experts, x, ids, weights, onto).output
    for threads in (2, 3):
        assert np.array_equal(together, run(isa, experts, x, ids, weights, onto, threads=threads).output)
    for first, last in ((0, 1), (5, 11), (11, 33)):
        part = (array[first:last] for array in (x, ids, weights, onto))
        assert np.array_equal(together[first:last], run(isa, experts, *part).output)
