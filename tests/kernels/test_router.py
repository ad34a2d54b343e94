"""Routers score in fp32 and choose as a stable sort would."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_reference import EXP, FP32, Near, assert_near, product, softmax
from rig import Rig, aligned, row_stride

from cpu_kernels import Scoring


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


def choose(isa, logits, top_k, *, renormalise=False, scoring="softmax", scale=1.0, threads=1, gate=None, **more):
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
        scoring=getattr(Scoring, scoring),
        scale=scale,
        **more,
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
        ({"scoring": "topk_softmax"}, share),
        ({"scoring": "topk_softmax", "renormalise": True}, share),
    ):
        ids, weights = choose(isa, logits, top_k, scale=scale, threads=2, **arguments)
        assert np.array_equal(ids, order)
        assert_near(weights, relative(scale * expected, logits))


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax", "sigmoid"])
def test_scores_are_kept_within_bounds_first_of_all(isa, scoring) -> None:
    logits = np.random.default_rng(4).normal(0, 5, (9, 21)).astype(np.float32)
    gate = aligned(9, np.float32)
    plain = choose(isa, 2 * np.tanh(logits[:, :20].astype(np.float64) / 2), 3, scoring=scoring)
    ids, weights = choose(isa, logits, 3, scoring=scoring, logit_cap=2.0, gate=gate)
    assert np.array_equal(ids, plain[0])
    assert np.allclose(weights, plain[1], rtol=64 * FP32, atol=0)
    assert np.allclose(gate, 1 / (1 + np.exp(-logits[:, 20])), rtol=64 * FP32, atol=0)
    logits[4, 7] = np.inf
    assert np.isnan(choose(isa, logits, 3, scoring=scoring, logit_cap=2.0, gate=gate)[1][4]).all()


def test_weights_of_an_expert_are_multiplied_by_its_own_scale(isa) -> None:
    random = np.random.default_rng(2)
    logits, scales = random.standard_normal((9, 10)).astype(np.float32), random.uniform(0.2, 3, 10).astype(np.float32)
    ids, plain = choose(isa, logits, 3, renormalise=True)
    same, weights = choose(isa, logits, 3, renormalise=True, expert_scales=scales)
    assert np.array_equal(ids, same)
    assert np.allclose(weights, plain * scales[ids], rtol=4 * FP32, atol=0)


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax"])
def test_of_equal_scores_the_lowest_index_wins(isa, scoring) -> None:
    logits = np.array([[1, 2, 2, 0, 2], [5, 5, 5, 5, 5], [0, 0, 3, 0, 0]])
    ids, weights = choose(isa, logits, 3, renormalise=True, scoring=scoring)
    assert ids.tolist() == [[1, 2, 4], [0, 1, 2], [2, 0, 1]]
    assert np.allclose(weights[:2], 1 / 3, rtol=EXP)


def test_scores_far_apart_neither_overflow_nor_vanish_together(isa) -> None:
    ids, weights = choose(isa, np.array([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]]), 2, renormalise=True)
    assert ids[:, 0].tolist() == [0, 1]
    assert np.allclose(weights, [[1, 0], [1, 0]], atol=1e-37)


@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax"])
@pytest.mark.parametrize("experts", [4, 16, 33])
def test_the_gate_of_a_shared_expert_is_a_sigmoid_of_its_own(isa, experts, scoring) -> None:
    """Behind the logits of the experts, which do not see it: largest of all, it is never chosen."""
    random = np.random.default_rng(experts)
    logits = random.standard_normal((9, experts + 1)).astype(np.float32)
    logits[:, -1] = [-1e30, -200, -88, -3, 0, 0.5, 30, 200, 1e30]
    plain = choose(isa, logits[:, :-1], 3, scoring=scoring)
    gate = aligned(9, np.float32)
    gated = choose(isa, logits, 3, scoring=scoring, gate=gate, threads=2)
    assert all(np.array_equal(one, other) for one, other in zip(plain, gated, strict=True))
    expected = 1 / (1 + np.exp(-np.clip(logits[:, -1].astype(np.float64), -88, 88)))
    assert np.allclose(gate, expected, rtol=1e-6, atol=0)


def chosen_by_sigmoid(logits: np.ndarray, top_k: int, correction: np.ndarray, groups: int, top_groups: int):
    """(ids, scores) as DeepSeek-V3 describes them, in float64; a group is worth its two best keys."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    keys = (scores + correction).reshape(len(logits), groups, -1)
    worth = np.sort(keys, axis=2)[:, :, -2:].sum(2)
    best = np.argsort(-worth, axis=1, kind="stable")[:, :top_groups]
    kept = np.full_like(keys, -np.inf)
    for row, own in enumerate(best):
        kept[row, own] = keys[row, own]
    ids = np.argsort(-kept.reshape(len(logits), -1), axis=1, kind="stable")[:, :top_k]
    return ids, np.take_along_axis(scores, ids, 1)


@pytest.mark.parametrize(("experts", "groups", "top_groups", "top_k"), [(10, 1, 1, 3), (32, 8, 4, 6), (64, 2, 1, 8)])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
def test_sigmoids_are_chosen_with_corrections_among_the_best_groups(
    isa, experts, groups, top_groups, top_k, corrected, renormalise
) -> None:
    random = np.random.default_rng(experts)
    logits = random.standard_normal((9, experts)).astype(np.float32)
    correction = random.standard_normal(experts).astype(np.float32)
    ids, weights = choose(
        isa, logits, top_k, scoring="sigmoid", renormalise=renormalise, scale=2.5, threads=2,
        correction=correction if corrected else None, groups=groups if groups > 1 else 0, top_groups=top_groups,
    )  # fmt: skip
    expected, scores = chosen_by_sigmoid(logits, top_k, correction * corrected, groups, top_groups)
    assert np.array_equal(ids, expected)
    total = scores.sum(1, keepdims=True) if renormalise else 1.0
    assert np.allclose(weights, 2.5 * scores / total, rtol=1e-6)


def test_a_correction_chooses_but_does_not_weigh(isa) -> None:
    logits, correction = np.array([[2.0, 1.0, 0.0]]), np.array([-10, 0, 0], np.float32)
    ids, weights = choose(isa, logits, 2, correction=correction)
    assert ids.tolist() == [[1, 2]]
    assert np.allclose(weights, softmax(logits)[:, 1:], rtol=1e-6)


def test_sigmoids_that_vanish_together_leave_finite_weights(isa) -> None:
    _, weights = choose(isa, np.full((1, 4), -1e4), 2, scoring="sigmoid", renormalise=True)
    assert np.isfinite(weights).all() and (weights >= 0).all()


def sparse(row: np.ndarray, jitter: float) -> tuple[list[int], list[float]]:
    """One after the other the largest score, and its share among those left that are close to it."""
    ids, weights = [], []
    left = row.astype(np.float64)
    for _ in range(2):
        top = left.max()
        near = (top - row.astype(np.float64)) / np.maximum(np.abs(row), top) <= 2 * jitter
        ids.append(int(left.argmax()))
        weights.append(float(1 / np.exp(left - top)[near].sum()))
        left[ids[-1]] = -np.inf
    return ids, weights


@pytest.mark.parametrize("experts", [2, 16, 37])
@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.3])
def test_sparsemixer_weighs_each_expert_among_those_close_to_it(isa, experts, jitter) -> None:
    random = np.random.default_rng(experts)
    logits = random.standard_normal((40, experts)).astype(np.float32)
    logits[0] = -1 - np.abs(logits[0])  # all negative
    logits[1, : experts // 2] = logits[1, 0]
    ids, weights = choose(isa, logits, 2, scoring="sparsemixer", jitter=jitter, threads=3)
    for row in range(len(logits)):
        wanted = sparse(logits[row], jitter)
        assert list(ids[row]) == wanted[0], row
        assert np.allclose(weights[row], wanted[1], rtol=1e-5), row


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_sparsemixer_of_a_damaged_row_weighs_nothing_by_a_number(isa, damage) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    logits[0, 5] = damage
    ids, weights = choose(isa, logits, 2, scoring="sparsemixer", jitter=0.01)
    assert list(ids[0]) == [0, 1] and np.isnan(weights[0]).all() and np.isfinite(weights[1]).all()
