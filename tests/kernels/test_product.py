"""Projections and the output head are the product within rounding, and no element depends on its neighbours."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_reference import assert_near, operand_product, rms_norm
from rig import (
    BF16,
    ISAS,
    Rig,
    aligned,
    empty_rows,
    format_of,
    other_on_tiles,
    packed,
    random_bf16,
    row_stride,
    rows_of,
)

import cpu_kernels
from hybrid.formats import FORMATS

ROWS = [1, 2, 5, 6, 7, 13, 17, 33, 100]
# k of 300 and 600 takes two and three panels; 130 leaves a few inputs to the last scale of fp8 and to the last of int4.
SIZES = [(16, 32), (40, 90), (40, 130), (203, 300), (64, 600), (1000, 32)]
FUSED = [isa for isa in ISAS if isa != "portable"]  # these multiply and add with one rounding


def multiply(isa, format, x, weight, n, *, threads=1, bias=None, onto=None, invariant=False) -> np.ndarray:
    """x [m, k], quantised as the format asks, times packed weights; checks that output padding is left alone."""
    m, k = x.shape
    rows = rows_of(format, x)
    output = aligned((m + 1, row_stride(n)), np.float32, fill=-7)
    if onto is not None:
        output[:m, :n] = onto
    rig = Rig(isa, threads, rows=m, batch_invariant=invariant)
    rig.add(
        "gemm",
        format=format_of(format),
        input=rows,
        weight=weight,
        bias=bias,
        output=output,
        columns=n,
        inputs=row_stride(k),
        input_stride=rows.strides[0],
        output_stride=row_stride(n),
        accumulate=onto is not None,
    )
    rig.run(m)
    assert (output[m:] == -7).all() and (output[:, n:] == -7).all()
    return output[:m, :n]


def operands(format, rows, n, k, seed=0):
    """Random x, packed weights, and what those stand for."""
    random = np.random.default_rng(seed)
    x, (weight, values) = random_bf16(random, rows, k), packed(format, random_bf16(random, n, k))
    return x, weight, values


def reference(isa, format, x, values):
    return operand_product(isa, format, rows_of(format, x), values)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_product_is_within_rounding(isa, format, n, k) -> None:
    x, weight, values = operands(format, max(ROWS), n, k)
    for rows in ROWS:
        assert_near(multiply(isa, format, x[:rows], weight, n), reference(isa, format, x[:rows], values))


def test_how_weights_are_read_changes_no_bit(isa, format) -> None:
    """Of few rows, for which they stream past once."""
    before = cpu_kernels.reading()
    try:
        for (n, k), rows in itertools.product(SIZES, (1, 2, 3, 4, 6)):
            x, weight, values = operands(format, rows, n, k)
            found = []
            for way in cpu_kernels.Reading:
                cpu_kernels.reading(way)
                found.append(multiply(isa, format, x, weight, n))
                assert cpu_kernels.reading() == way
            assert_near(found[0], reference(isa, format, x, values))
            assert all(np.array_equal(found[0], other) for other in found[1:])
    finally:
        cpu_kernels.reading(before)


@settings(max_examples=25, derandomize=True)
@given(rows=st.integers(1, 40), n=st.integers(1, 80), k=st.integers(1, 290), threads=st.integers(1, 3))
def test_any_size_and_number_of_threads(rows, n, k, threads) -> None:
    for format in FORMATS:
        x, weight, values = operands(format, rows, n, k)
        for isa in ISAS:
            found = multiply(isa, format, x, weight, n, threads=threads)
            assert_near(found, reference(isa, format, x, values))


@pytest.mark.parametrize("rows", [1, 7, 33])
def test_a_bias_is_added_and_an_output_accumulated(isa, format, rows) -> None:
    random = np.random.default_rng(0)
    x, weight, values = operands(format, rows, 40, 90)
    expected = reference(isa, format, x, values)
    bias, onto = (random.standard_normal(shape).astype(np.float32) for shape in (40, (rows, 40)))
    assert_near(multiply(isa, format, x, weight, 40, bias=bias), expected + bias)
    assert_near(multiply(isa, format, x, weight, 40, onto=onto), expected + onto)
    assert_near(multiply(isa, format, x, weight, 40, bias=bias, onto=onto), (expected + bias) + onto)


@pytest.mark.parametrize(("n", "k"), [(1000, 90), (200, 600)])
def test_a_row_is_the_same_alone_and_among_others_and_on_any_number_of_threads(isa, format, n, k) -> None:
    x, weight, _ = operands(format, 33, n, k)
    product = partial(multiply, isa, format, weight=weight, n=n, invariant=True)
    together = product(x)
    for threads in (2, 3):
        assert np.array_equal(together, product(x, threads=threads))
    for first, last in ((0, 1), (4, 6), (8, 15), (20, 33)):
        assert np.array_equal(together[first:last], product(x[first:last]))


@pytest.mark.parametrize("n", [16, 80, 600, 4000])
def test_threads_that_take_from_each_other_multiply_everything_once(isa, n) -> None:
    x, weight, _ = operands("bf16", 2, n, 90)

    def added_up(threads: int, steps: int = 20) -> np.ndarray:
        output = aligned((2, row_stride(n)), np.float32)
        rig = Rig(isa, threads, rows=2)
        rig.add(
            "gemm", format=format_of("bf16"), input=rows_of("bf16", x), weight=weight, bias=None, output=output,
            columns=n, inputs=row_stride(90), input_stride=2 * row_stride(90), output_stride=row_stride(n),
            accumulate=True,
        )  # fmt: skip
        for _ in range(steps):
            rig.run(2)
        return output

    expected = added_up(1)
    for threads in (2, 3, 7, 13):
        assert np.array_equal(added_up(threads), expected)


@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set with fused multiply-add is here")
@pytest.mark.parametrize("format", [name for name in FORMATS if FORMATS[name].integer])
@pytest.mark.parametrize("rows", [3, 33])
def test_integer_formats_give_the_same_bits_on_every_instruction_set_with_fma(format, rows) -> None:
    x, weight, _ = operands(format, rows, 203, 600)
    isas = [isa for isa in FUSED if not other_on_tiles(isa, format, rows)]
    first, *others = (multiply(isa, format, x, weight, 203) for isa in isas)
    for other in others:
        assert np.array_equal(first, other)


@pytest.mark.parametrize("logit_rows", [[], [0], [12], [0, 5, 6, 12], range(13)], ids=str)
def test_the_head_gathers_the_rows_whose_logits_are_wanted(isa, format, logit_rows) -> None:
    random = np.random.default_rng(1)
    hidden, vocab, rows, eps = 90, 203, 13, 1e-5
    residual = aligned((rows, row_stride(hidden)), np.float32)
    residual[:, :hidden] = random.standard_normal((rows, hidden))
    norm_weight = random.standard_normal(hidden).astype(np.float32)
    head, head_values = packed(format, random_bf16(random, vocab, hidden))
    kind = FORMATS[format].rows
    normed = aligned((rows, row_stride(hidden)), BF16)
    quantised = empty_rows(format, rows, hidden)
    read = normed if kind == "bf16" else quantised
    rig = Rig(isa, 2, vocab=vocab)
    rig.add(
        "norm",
        "head",
        input=residual,
        weight=norm_weight,
        output=normed if kind == "bf16" else None,
        output_f32=None,
        output8=quantised if kind == "int8" else None,
        output_grouped=quantised if kind == "grouped" else None,
        output_wide=quantised if kind == "wide" else None,
        width=hidden,
        input_stride=row_stride(hidden),
        output_stride=row_stride(hidden),
        output8_stride=quantised.strides[0],
        output_grouped_stride=quantised.strides[0],
        output_wide_stride=quantised.strides[0],
        eps=eps,
        logit_rows=True,
    )
    rig.add(
        "gemm",
        "head",
        format=format_of(format),
        input=read,
        weight=head,
        bias=None,
        output=None,
        columns=vocab,
        inputs=row_stride(hidden),
        input_stride=read.strides[0],
        output_stride=vocab,
        accumulate=False,
    )
    logits = rig.run(rows, logit_rows)
    wanted = len(logit_rows)
    if kind == "bf16":
        exact = rms_norm(residual[list(logit_rows), :hidden], norm_weight, eps)
        assert_near(normed[:wanted, :hidden], exact.as_bf16())
    assert_near(logits, operand_product(isa, format, read[:wanted], head_values))
    assert not normed[wanted:].any() and not quantised[wanted:].any()
