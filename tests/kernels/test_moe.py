"""Rows are sorted by expert exactly; gate, up and down are within rounding whatever the routing and the format."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from expert_rig import Experts, Part, Routed, Rows, run
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import (
    FP32,
    Near,
    assert_near,
    gelu_tanh_times,
    operand_product,
    relu_squared,
    silu_times,
    swiglu_clamped,
)
from rig import BF16, ISAS, TRIED, Rig, paired, random_bf16, rows_of

from hybrid.formats import FORMATS

ACTIVATIONS = {
    "silu": silu_times,
    "swiglu_clamped": swiglu_clamped,
    "gelu_tanh": gelu_tanh_times,
    "relu_squared": relu_squared,
}


def check(isa, routed: Routed, experts: Experts, x, ids, weights, onto, shared=None, gate=None) -> None:
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
    add_experts(isa, output, routed, experts, x)
    if shared is not None:
        check_shared(routed.shared, len(x), gate)
        add_experts(isa, output, routed.shared, shared, x)
    assert_near(routed.output, output)


def check_shared(rows: Rows, count: int, gate: np.ndarray | None) -> None:
    """Every row once, in order."""
    assert np.array_equal(rows.offsets, [0, count]) and np.array_equal(rows.active, [0])
    assert np.array_equal(rows.rows, np.arange(count))
    expected = np.ones(count) if gate is None else gate
    assert np.allclose(rows.weights, expected, rtol=1e-6 if gate is not None else 0, atol=0)


def add_experts(isa, output: Near, routed: Rows, experts: Experts, x: np.ndarray) -> None:
    """Check the activations of a set of experts, and add what down makes of them."""
    inputs = rows_of(experts.format, x)
    for expert in routed.active:
        part = slice(*routed.offsets[expert : expert + 2])
        rows, scale = routed.rows[part], routed.weights[part, None]
        gate, up = (_linear(isa, experts, which, expert, inputs[rows]) for which in (0, 1))
        assert_near(routed.activation[part], ACTIVATIONS[experts.activation](gate, up).as_bf16())
        down = _linear(isa, experts, 2, expert, routed.operand[part])
        output.value[rows] += scale * down.value
        output.bound[rows] += np.abs(scale) * down.bound + 4 * FP32 * (
            np.abs(scale * down.value) + np.abs(output.value[rows])
        )


def _linear(isa, experts: Experts, which: int, expert: int, rows: np.ndarray) -> Near:
    """Gate, up or down (0, 1, 2) of one expert for all of its rows, with its bias."""
    near = operand_product(isa, experts.format, rows, experts.values[which][expert])
    return near if experts.biases is None else near + experts.biases[which][expert]


def try_routing(isa, experts: Experts, ids, *, rows=None, size=1.0, threads=1, shared=None, gated=False) -> Routed:
    random = np.random.default_rng(3)
    hidden, weights = experts.hidden, None
    if ids is not None:
        ids = np.ascontiguousarray(ids, np.int32)
        rows, weights = len(ids), random.random(ids.shape).astype(np.float32)
    x = (size * random.standard_normal((rows, hidden)) / np.sqrt(hidden)).astype(BF16)
    onto = random.standard_normal((rows, hidden)).astype(np.float32)
    gate = (0.1 + 0.8 * random.random(rows)).astype(np.float32) if gated else None
    routed = run(isa, experts, x, ids, weights, onto, shared=shared, gate=gate, threads=threads)
    check(isa, routed, experts, x, ids, weights, onto, shared, gate)
    return routed


def choose(rows: int, top_k: int, experts: int, seed: int = 0) -> np.ndarray:
    """Different experts for every row."""
    random = np.random.default_rng(seed)
    return np.array([random.permutation(experts)[:top_k] for _ in range(rows)])


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_random_routing(isa, format, top_k) -> None:
    experts = Experts.make(format, 10, 90, 40)
    for rows in (1, 2, 7, 33):
        try_routing(isa, experts, choose(rows, top_k, 10))


def test_one_expert_takes_every_row_and_others_none(isa, format) -> None:
    experts = Experts.make(format, 10, 90, 40)
    for rows in (1, 6, 50):
        try_routing(isa, experts, [[7]] * rows)
        try_routing(isa, experts, [[9, 0]] * rows)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.5])
def test_the_only_expert_may_have_another_weight(weight) -> None:
    """In a table that no router made."""
    part = Part(Experts.make("bf16", 1, 16, 16), np.zeros((5, 16), BF16), None, None)
    rig = Rig("portable", 1, rows=5)
    part.group(rig, weight=weight)
    rig.run(5)
    assert np.array_equal(part.integers["rows"], np.arange(5)) and (part.gates == weight).all()


def test_an_expert_with_one_row_beside_one_with_many(isa, format) -> None:
    try_routing(isa, Experts.make(format, 10, 90, 40), [[4, 2]] + [[2, 8]] * 40, threads=3)


@pytest.mark.parametrize("sizes", [(32, 16), (90, 40), (300, 203), (40, 600), (700, 40), (130, 130)])
def test_a_dense_layer_is_one_expert_of_weight_one(isa, format, sizes) -> None:
    experts = Experts.make(format, 1, *sizes)
    for rows in (1, 7, 33):
        try_routing(isa, experts, None, rows=rows, threads=2)


@pytest.mark.parametrize("bias", [False, True])
def test_clamped_swiglu_and_biases(isa, format, bias) -> None:
    """Inputs so large that gate and up pass both clamps."""
    experts = Experts.make(format, 5, 90, 40, bias=bias, activation="swiglu_clamped")
    for rows in (1, 33):
        try_routing(isa, experts, choose(rows, 3, 5), size=8, threads=2)
    try_routing(isa, experts, [[2]] * 9)


def test_biases_of_gate_up_and_down(isa, format) -> None:
    for sizes in ((90, 40), (40, 90), (16, 16)):
        experts = Experts.make(format, 5, *sizes, bias=True)
        for rows in (1, 33):
            try_routing(isa, experts, choose(rows, 3, 5), threads=3)


def test_clamping_has_the_values_of_its_definition(isa) -> None:
    """Gates and ups given by the biases alone."""
    gates, ups = np.meshgrid([-40.0, -7, -1, 0, 1, 6.5, 7, 40], [-40.0, -7, -1, 0, 6.5, 7, 40])
    experts = Experts.make("bf16", 1, 16, gates.size, bias=True, activation="swiglu_clamped")
    gate_bias, up_bias, _ = experts.biases
    gate_bias[0], up_bias[0] = gates.reshape(-1), ups.reshape(-1)
    onto = np.zeros((1, 16), np.float32)
    routed = run(isa, experts, np.zeros((1, 16), BF16), None, None, onto)
    g, u = np.minimum(gates, 7).reshape(-1), np.clip(ups, -7, 7).reshape(-1)
    expected = (g / (1 + np.exp(-1.702 * g)) * (u + 1)).astype(np.float32)
    assert np.allclose(routed.activation[0].astype(np.float32), expected, rtol=1.01 * 2.0**-8, atol=0)


@pytest.mark.parametrize(("bound", "other"), [(4.0, 0.0), (0.0, 7.0), (4.0, 7.0)])
def test_bounds_have_the_values_of_their_definition(isa, bound, other) -> None:
    """Of experts and of the shared one; gates and ups given by the biases alone."""
    gates, ups = np.meshgrid([-40.0, -7, -1, 0, 1, 4, 4.5, 7.5, 40], [-40.0, -7, -4, 0, 3.5, 4, 7, 40])
    experts, shared = (
        replace(Experts.make("bf16", 1, 16, gates.size, bias=True), bound=each) for each in (bound, other)
    )
    for part in (experts, shared):
        part.biases[0][0], part.biases[1][0] = gates.reshape(-1), ups.reshape(-1)
    onto = np.zeros((1, 16), np.float32)
    routed = run(isa, experts, np.zeros((1, 16), BF16), None, None, onto, shared=shared)
    for found, limit in ((routed.activation, bound), (routed.shared.activation, other)):
        g, u = (gates / (1 + np.exp(-gates))).reshape(-1), ups.reshape(-1)
        if limit:
            g, u = np.minimum(g, limit), np.clip(u, -limit, limit)
        assert np.allclose(found[0].astype(np.float32), g * u, rtol=1.01 * 2.0**-8, atol=1e-20)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_bounds_make_no_numbers_of_damage(isa, which, value) -> None:
    experts = replace(Experts.make("bf16", 1, 16, 16, bias=True), bound=4.0)
    experts.biases[0][0], experts.biases[1][0] = 1, 1
    experts.biases[which][0, 3] = value
    routed = run(isa, experts, np.zeros((1, 16), BF16), None, None, np.zeros((1, 16), np.float32))
    finite = np.isfinite(routed.activation[0].astype(np.float32))
    assert not finite[3] and finite[np.arange(16) != 3].all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [(90, 40, 24), (40, 33, 130), (300, 64, 64)])
def test_a_shared_expert_goes_along(isa, format, sizes, gated) -> None:
    """hidden, intermediate of the routed experts, and of the shared one; on more threads than some of it has blocks."""
    experts = Experts.make(format, 10, *sizes[:2])
    shared = Experts.make(format, 1, sizes[0], sizes[2], seed=1)
    for rows in (1, 7, 33):
        for threads in (1, 3):
            try_routing(isa, experts, choose(rows, 3, 10), threads=threads, shared=shared, gated=gated)


@pytest.mark.parametrize(("format", "other", "isa"), paired(TRIED, FORMATS))
def test_a_shared_expert_may_have_another_format(isa, format, other) -> None:
    """Every pair of formats, each with one instruction set: each of those meets either format in both places."""
    experts = Experts.make(format, 6, 90, 40, bias=True, activation="swiglu_clamped")
    shared = Experts.make(other, 1, 90, 72, activation="swiglu_clamped", seed=1)
    for rows in (1, 33):
        try_routing(isa, experts, choose(rows, 2, 6), threads=2, shared=shared, gated=True)


def test_a_shared_expert_is_the_same_bits_on_any_number_of_threads(isa, format) -> None:
    random = np.random.default_rng(5)
    experts, shared = Experts.make(format, 10, 300, 40), Experts.make("int8", 1, 300, 72, seed=1)
    ids, gate = choose(33, 3, 10).astype(np.int32), random.uniform(0.1, 0.9, 33).astype(np.float32)
    weights = random.random(ids.shape).astype(np.float32)
    x, onto = random_bf16(random, 33, 300), random.standard_normal((33, 300)).astype(np.float32)
    both = partial(run, isa, experts, shared=shared, invariant=True)
    whole = both(x, ids, weights, onto, gate=gate).output
    for threads in (2, 3):
        again = both(x, ids, weights, onto, gate=gate, threads=threads)
        assert np.array_equal(whole, again.output)
    for first, last in ((0, 1), (5, 11)):
        part = [array[first:last] for array in (x, ids, weights, onto)]
        assert np.array_equal(whole[first:last], both(*part, gate=gate[first:last]).output)
    assert not np.array_equal(whole, run(isa, experts, x, ids, weights, onto).output)


@settings(max_examples=15, derandomize=True)
@given(
    format=st.sampled_from(list(FORMATS)),
    rows=st.integers(1, 20),
    experts=st.integers(4, 9),
    top_k=st.integers(1, 4),
    hidden=st.integers(1, 100),
    intermediate=st.integers(1, 60),
    threads=st.integers(1, 3),
)
def test_any_size_and_number_of_threads(format, rows, experts, top_k, hidden, intermediate, threads) -> None:
    made = Experts.make(format, experts, hidden, intermediate)
    for isa in ISAS:
        try_routing(isa, made, choose(rows, top_k, experts, rows), threads=threads)


def test_a_row_is_the_same_alone_and_among_others_and_on_any_number_of_threads(isa, format) -> None:
    random = np.random.default_rng(5)
    experts, ids = Experts.make(format, 10, 300, 40), choose(33, 3, 10).astype(np.int32)
    weights = random.random(ids.shape).astype(np.float32)
    x, onto = random_bf16(random, 33, 300), random.standard_normal((33, 300)).astype(np.float32)
    routed = partial(run, isa, experts, invariant=True)
    together = routed(x, ids, weights, onto).output
    for threads in (2, 3):
        assert np.array_equal(together, routed(x, ids, weights, onto, threads=threads).output)
    for first, last in ((0, 1), (5, 11), (11, 33)):
        part = (array[first:last] for array in (x, ids, weights, onto))
        assert np.array_equal(together[first:last], routed(*part).output)


@pytest.mark.parametrize("size", [0.3, 3.0, 60.0])
def test_gelu_by_a_tangent(isa, size) -> None:
    experts = Experts.make("bf16", 5, 90, 40, bias=True, activation="gelu_tanh")
    for rows in (1, 33):
        try_routing(isa, experts, choose(rows, 3, 5), size=size, threads=2)


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_experts_without_a_gate(isa, format, rows) -> None:
    experts = Experts.make(format, 5, 90, 72, activation="relu_squared")
    shared = Experts.make(format, 1, 90, 40, activation="relu_squared", seed=1)
    try_routing(isa, experts, choose(rows, 3, 5), size=3.0, threads=2, shared=shared)


@pytest.mark.parametrize("rows", [1, 33])
def test_a_dense_feed_forward_without_a_gate(isa, rows) -> None:
    experts = Experts.make("bf16", 1, 130, 50, bias=True, activation="relu_squared")
    try_routing(isa, experts, None, rows=rows, threads=2)
