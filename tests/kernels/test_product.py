"""Projections and the output head are the product within rounding, and no element depends on its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import assert_near, product, rms_norm
from rig import BF16, ISAS, Rig, aligned, padded, placed, random_bf16

from hybrid.program import pairs, row_stride
from hybrid.weights.layout import pack_matrix

ROWS = [1, 2, 5, 6, 7, 13, 17, 33, 100]
SIZES = [(16, 32), (40, 90), (203, 300), (64, 600), (1000, 32)]  # k of 300 and 600 takes two and three panels


def multiply(isa, x, w, *, threads=1, bias=None, onto=None) -> np.ndarray:
    """x [m, k] times w [n, k] by the op; checks that the padding of the output is left alone."""
    (m, k), n = x.shape, len(w)
    output = aligned((m + 1, row_stride(n)), np.float32, fill=-7)
    if onto is not None:
        output[:m, :n] = onto
    rig = Rig(isa, threads)
    rig.add(
        "gemm",
        input=padded(x),
        weight=placed(pack_matrix(w)),
        bias=bias,
        output=output,
        columns=n,
        pairs=pairs(k),
        input_stride=row_stride(k),
        output_stride=row_stride(n),
        accumulate=onto is not None,
    )
    rig.run(m)
    assert (output[m:] == -7).all() and (output[:, n:] == -7).all()
    return output[:m, :n]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_product_is_within_rounding(isa, rows, n, k) -> None:
    random = np.random.default_rng(rows)
    x, w = random_bf16(random, rows, k), random_bf16(random, n, k)
    assert_near(multiply(isa, x, w), product(x, w))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), n=st.integers(1, 80), k=st.integers(1, 290), threads=st.integers(1, 3))
def test_any_size_and_number_of_threads(rows, n, k, threads) -> None:
    random = np.random.default_rng(k)
    x, w = random_bf16(random, rows, k), random_bf16(random, n, k)
    for isa in ISAS:
        assert_near(multiply(isa, x, w, threads=threads), product(x, w))


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_a_bias_is_added_and_an_output_accumulated(isa, rows) -> None:
    random = np.random.default_rng(0)
    x, w = random_bf16(random, rows, 90), random_bf16(random, 40, 90)
    bias, onto = (random.standard_normal(shape).astype(np.float32) for shape in (40, (rows, 40)))
    expected = product(x, w)
    assert_near(multiply(isa, x, w, bias=bias), expected + bias)
    assert_near(multiply(isa, x, w, onto=onto), expected + onto)
    assert_near(multiply(isa, x, w, bias=bias, onto=onto), (expected + bias) + onto)


@pytest.mark.parametrize("k", [90, 600])
def test_a_row_is_the_same_alone_and_among_others_and_on_any_number_of_threads(isa, k) -> None:
    random = np.random.default_rng(k)
    x, w = random_bf16(random, 33, k), random_bf16(random, 1000, k)
    together = multiply(isa, x, w)
    for threads in (2, 3):
        assert np.array_equal(together, multiply(isa, x, w, threads=threads))
    for first, last in ((0, 1), (4, 6), (8, 15), (20, 33)):
        assert np.array_equal(together[first:last], multiply(isa, x[first:last], w))


@pytest.mark.parametrize("logit_rows", [[], [0], [12], [0, 5, 6, 12], range(13)], ids=str)
def test_the_head_gathers_the_rows_whose_logits_are_wanted(isa, logit_rows) -> None:
    random = np.random.default_rng(1)
    hidden, vocab, rows, eps = 90, 203, 13, 1e-5
    residual = aligned((rows, row_stride(hidden)), np.float32)
    residual[:, :hidden] = random.standard_normal((rows, hidden))
    weight = random.standard_normal(hidden).astype(np.float32)
    head = random_bf16(random, vocab, hidden)
    normed = aligned((rows, row_stride(hidden)), BF16)
    rig = Rig(isa, 2, vocab=vocab)
    rig.add(
        "norm",
        "head",
        input=residual,
        weight=weight,
        output=normed,
        output_f32=None,
        width=hidden,
        input_stride=row_stride(hidden),
        output_stride=row_stride(hidden),
        eps=eps,
        logit_rows=True,
    )
    rig.add(
        "gemm",
        "head",
        input=normed,
        weight=placed(pack_matrix(head)),
        bias=None,
        output=None,
        columns=vocab,
        pairs=pairs(hidden),
        input_stride=row_stride(hidden),
        output_stride=vocab,
        accumulate=False,
    )
    logits = rig.run(rows, logit_rows)
    wanted = len(logit_rows)
    assert_near(normed[:wanted, :hidden], rms_norm(residual[list(logit_rows), :hidden], weight, eps).as_bf16())
    assert_near(logits, product(normed[:wanted, :hidden], head))
    assert not normed[wanted:].any()
