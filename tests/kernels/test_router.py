"""Routers score in fp32 and choose as a stable sort would."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_reference import EXP, FP32, Near, assert_near, product, softmax
from rig import Rig, aligned, row_stride


def score(isa, x: np.ndarray, weight: np.ndarray, *, bias=None, threads=1) -> np.ndarray:
    """Logits [rows, experts] of x [rows, row_stride(hidden)]."""
    experts, hidden = weight.shape
    logits = aligned((len(x), experts), np.float32)
    rig = Rig(isa, threads)
    rig.add(
        "router",
        input=x,
        weight=weight,
        bias=bias,
        logits=logits,
        experts=experts,
        hidden=hidden,
        input_stride=x.shape[1],
    )
    rig.run(len(x))
    return logits


@pytest.mark.parametrize("rows", [1, 7, 16, 17, 40])
@pytest.mark.parametrize(("experts", "hidden"), [(1, 32), (10, 90), (128, 300)])
def test_router_scores_are_products_of_fp32(isa, rows, experts, hidden) -> None:
    random = np.random.default_rng(rows)
    x = aligned((rows, row_stride(hidden)), np.float32)
    x[:, :hidden] = random.standard_normal((rows, hidden))
    weight, bias = (random.standard_normal(shape).astype(np.float32) for shape in ((experts, hidden), experts))
    logits = score(isa, x, weight)
    assert_near(logits, product(x[:, :hidden], weight))
    assert np.array_equal(logits, score(isa, x, weight, threads=3))
    for threads in (1, 3):
        assert np.array_equal(logits + bias, score(isa, x, weight, bias=bias, threads=threads))


def choose(isa, logits, top_k, *, renormalise=False, softmax_after=False, scale=1.0, threads=1, gate=None):
    """(ids, weights) [rows, top_k] of logits [rows, experts]; gate: for the weights [rows] of the shared expert."""
    rows, experts = logits.shape[0], logits.shape[1] - (gate is not None)
    ids, weights = aligned((rows, top_k), np.int32, -7), aligned((rows, top_k), np.float32)
    rig = Rig(isa, threads)
    rig.add(
        "topk",
        logits=np.array(logits, np.float32),
        ids=ids,
        weights=weights,
        shared_weights=gate,
        experts=experts,
        top_k=top_k,
        renormalise=renormalise,
        softmax_after=softmax_after,
        scale=scale,
    )
    rig.run(rows)
    return ids, weights


def relative(value: np.ndarray, logits: np.ndarray) -> Near:
    """A softmax over these logits: their differences are rounded, then the exponential and its sum."""
    return Near(value, (2 * EXP + (16 + 2 * np.ptp(logits)) * FP32) * value)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (10, 3), (33, 4), (128, 8)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_largest_are_chosen_and_weighed(isa, experts, top_k, scale) -> None:
    logits = (3 * np.random.default_rng(experts).standard_normal((13, experts))).astype(np.float32)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    probabilities = np.take_along_axis(softmax(logits), order, 1)
    share = probabilities / probabilities.sum(1, keepdims=True)
    for arguments, expected in (
        ({}, probabilities),
        ({"renormalise": True}, share),
        ({"softmax_after": True}, share),
        ({"softmax_after": True, "renormalise": True}, share),
    ):
        ids, weights = choose(isa, logits, top_k, scale=scale, threads=2, **arguments)
        assert np.array_equal(ids, order)
        assert_near(weights, relative(scale * expected, logits))


@pytest.mark.parametrize("softmax_after", [False, True])
def test_of_equal_scores_the_lowest_index_wins(isa, softmax_after) -> None:
    logits = np.array([[1, 2, 2, 0, 2], [5, 5, 5, 5, 5], [0, 0, 3, 0, 0]])
    ids, weights = choose(isa, logits, 3, renormalise=True, softmax_after=softmax_after)
    assert ids.tolist() == [[1, 2, 4], [0, 1, 2], [2, 0, 1]]
    assert np.allclose(weights[:2], 1 / 3, rtol=EXP)


def test_scores_far_apart_neither_overflow_nor_vanish_together(isa) -> None:
    ids, weights = choose(isa, np.array([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]]), 2, renormalise=True)
    assert ids[:, 0].tolist() == [0, 1]
    assert np.allclose(weights, [[1, 0], [1, 0]], atol=1e-37)


@pytest.mark.parametrize("softmax_after", [False, True])
@pytest.mark.parametrize("experts", [4, 16, 33])
def test_the_gate_of_a_shared_expert_is_a_sigmoid_of_its_own(isa, experts, softmax_after) -> None:
    """Behind the logits of the experts, which do not see it: largest of all, it is never chosen."""
    random = np.random.default_rng(experts)
    logits = random.standard_normal((9, experts + 1)).astype(np.float32)
    logits[:, -1] = [-1e30, -200, -88, -3, 0, 0.5, 30, 200, 1e30]
    plain = choose(isa, logits[:, :-1], 3, softmax_after=softmax_after)
    gate = aligned(9, np.float32)
    gated = choose(isa, logits, 3, softmax_after=softmax_after, gate=gate, threads=2)
    assert all(np.array_equal(one, other) for one, other in zip(plain, gated, strict=True))
    expected = 1 / (1 + np.exp(-np.clip(logits[:, -1].astype(np.float64), -88, 88)))
    assert np.allclose(gate, expected, rtol=1e-6, atol=0)
