"""Embedding rows are exact, norms within rounding."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_reference import FP32, Near, assert_near, rms_norm
from rig import BF16, Rig, aligned, format_of, packed, random_bf16, row_stride, rows_of

from hybrid.models.layers.products import UNNORMED_WEIGHT


@pytest.mark.parametrize(("vocab", "hidden"), [(16, 32), (131, 90), (203, 33)])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_embedding_is_the_row_of_the_table(isa, vocab, hidden, threads) -> None:
    table = random_bf16(np.random.default_rng(0), vocab, hidden)
    tokens = [vocab - 1, 0, 15, vocab // 2, 0]
    output = aligned((6, row_stride(hidden)), np.float32, fill=-7)
    rig = Rig(isa, threads, vocab=vocab)
    rig.add(
        "embed",
        table=packed("bf16", table)[0],
        output=output,
        hidden=hidden,
        pairs=row_stride(hidden) // 2,
        output_stride=row_stride(hidden),
    )
    rig.run(5, tokens=tokens)
    assert np.array_equal(output[:5, :hidden], table[tokens].astype(np.float32))
    assert (output[5:] == -7).all() and (output[:, hidden:] == -7).all()


@pytest.mark.parametrize("width", [16, 90, 300, 601])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_norm_is_within_rounding(isa, width, rows, size) -> None:
    random = np.random.default_rng(width)
    stride, eps = row_stride(width), 1e-6
    x = aligned((rows, stride), np.float32)
    x[:, :width] = size * random.standard_normal((rows, width))
    weight = random.standard_normal(width).astype(np.float32)
    output, exact = aligned((rows, stride), BF16), aligned((rows, stride), np.float32)
    arguments = {"input": x, "weight": weight, "width": width, "input_stride": stride, "output_stride": stride}
    for f32 in (exact, None):
        rig = Rig(isa, 2)
        outputs = {"output": output, "output_f32": f32, "output8": None, "output8_stride": 0}
        rig.add("norm", eps=eps, logit_rows=False, **outputs, **arguments)
        rig.run(rows)
        expected = rms_norm(x[:, :width], weight, eps)
        assert_near(output[:, :width], expected.as_bf16())
        assert_near(exact[:, :width], expected)
        assert not output[:, width:].any() and not exact[:, width:].any()
        output[...] = 0


@pytest.mark.parametrize("width", [16, 90, 601])
@pytest.mark.parametrize("size", [1e-20, 1e-4, 1.0, 1e6])
def test_rows_that_are_not_normed_are_the_same_bits(isa, width, size) -> None:
    """Which layers put as a norm whose epsilon and weights take each other away."""
    rows, stride = 7, row_stride(width)
    x, found = aligned((rows, stride), np.float32), aligned((rows, stride), np.float32)
    x[:, :width] = size * np.random.default_rng(width).standard_normal((rows, width))
    weight = np.full(width, UNNORMED_WEIGHT, np.float32)
    outputs = {"output": aligned((rows, stride), BF16), "output_f32": found, "output8": None, "output8_stride": 0}
    rig = Rig(isa, 2)
    rig.add(
        "norm", input=x, weight=weight, width=width, input_stride=stride, output_stride=stride,
        eps=UNNORMED_WEIGHT**2, logit_rows=False, **outputs,
    )  # fmt: skip
    rig.run(rows)
    assert np.array_equal(found, x) and np.array_equal(outputs["output"], x.astype(BF16))


@pytest.mark.parametrize("width", [16, 90, 601])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_centred_norm_with_a_bias_is_a_layer_norm(isa, width, offset) -> None:
    random, rows = np.random.default_rng(width), 5
    stride, eps = row_stride(width), 1e-5
    x, exact = aligned((rows, stride), np.float32), aligned((rows, stride), np.float32)
    x[:, :width] = offset + random.standard_normal((rows, width))
    weight, bias = (random.standard_normal(width).astype(np.float32) for _ in range(2))
    outputs = {"output": None, "output_f32": exact, "output8": None, "output8_stride": 0}
    rig = Rig(isa, 2)
    rig.add(
        "norm", input=x, weight=weight, bias=bias, centred=True, width=width, input_stride=stride,
        output_stride=stride, eps=eps, logit_rows=False, **outputs,
    )  # fmt: skip
    rig.run(rows)
    wide = x[:, :width].astype(np.float64)
    near = rms_norm(wide - wide.mean(1, keepdims=True), weight, eps)
    lost = (width + 6) * FP32 * np.abs(wide).max() * np.abs(weight)  # what the mean and the difference round
    assert_near(exact[:, :width], Near(near.value + bias, 2 * near.bound + lost + FP32 * np.abs(near.value + bias)))
    assert not exact[:, width:].any()


@pytest.mark.parametrize("width", [16, 90])
def test_a_norm_adds_to_rows_and_clears_others(isa, width) -> None:
    random, rows, stride = np.random.default_rng(width), 5, row_stride(width)
    x, onto, other = (aligned((rows, stride), np.float32) for _ in range(3))
    for some in (x, onto, other):
        some[:, :width] = random.standard_normal((rows, width))
    weight, plain = random.standard_normal(width).astype(np.float32), aligned((rows, stride), np.float32)
    before = onto.copy()
    for output, more in ((plain, {}), (onto, {"accumulate": True, "cleared": other})):
        rig = Rig(isa, 2)
        rig.add(
            "norm", input=x, weight=weight, output=None, output_f32=output, output8=None, output8_stride=0,
            width=width, input_stride=stride, output_stride=stride, eps=1e-6, logit_rows=False, **more,
        )  # fmt: skip
        rig.run(rows)
    assert np.array_equal(onto, before + plain) and not other.any()
    factor, onto[:] = np.array([0.7], np.float32), before
    rig = Rig(isa, 2)
    rig.add(
        "norm", input=x, weight=weight, output=None, output_f32=onto, output8=None, output8_stride=0, width=width,
        input_stride=stride, output_stride=stride, eps=1e-6, logit_rows=False, accumulate=True, factor=factor,
    )  # fmt: skip
    rig.run(rows)
    assert np.array_equal(onto, (before + plain) * factor)


@pytest.mark.parametrize(("vocab", "cap"), [(40, 30.0), (131, 0.5)])
def test_logits_are_kept_between_bounds(isa, vocab, cap) -> None:
    """The tangent is one of a sigmoid: what its difference to 1 loses is lost of the cap."""
    random, rows, hidden = np.random.default_rng(vocab), 3, 20
    x, weight = (10 * random.standard_normal(shape).astype(np.float32) for shape in ((rows, hidden), (vocab, hidden)))
    x[:, 0] = [1.0, 100.0, np.nan]
    logits = []
    for capped in (False, True):
        rig = Rig(isa, 2, vocab=vocab)
        packed_weight, _ = packed("bf16", weight)
        stride = 2 * row_stride(hidden)
        rig.add(
            "gemm", format=format_of("bf16"), input=rows_of("bf16", x), weight=packed_weight, bias=None, output=None,
            columns=vocab, inputs=row_stride(hidden), input_stride=stride, output_stride=vocab, accumulate=False,
        )  # fmt: skip
        if capped:
            rig.add("soft_cap", columns=vocab, cap=cap)
        logits.append(rig.run(rows, range(rows)))
    plain, found = logits
    assert np.abs(plain[1]).max() > 20 * cap and np.isnan(found[2]).all()
    wanted = cap * np.tanh(plain[:2].astype(np.float64) / cap)
    assert np.abs(found[:2] - wanted).max() <= 8 * FP32 * cap
