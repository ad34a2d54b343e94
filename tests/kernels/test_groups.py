"""Codes in groups: every format that has them, and published codes and scales from the whole of what they may be."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_reference import assert_near, operand_product
from rig import BF16, ISAS, Rig, aligned, empty_rows, format_of, other_on_tiles, placed, random_bf16, rows_of
from test_product import FUSED, multiply

from hybrid.formats import GROUPED

ROWS = (1, 2, 3, 4, 5, 9, 17)  # streams of one, two and four rows; panels; tiles


def published(format: str, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes and scales at random, and the numbers that they stand for."""
    kind, random = GROUPED[format], np.random.default_rng(0)
    codes = random.integers(0, 1 << kind.bits, (n, k), np.uint8)
    codes = codes.view(np.int8) if kind.bits == 8 else codes

    def halves(group: int) -> np.ndarray:
        return random.uniform(-2, 2, (n, -(-k // group))).astype(np.float16)

    small = [random.integers(0, 64, (n, -(-k // 32)), np.uint8) for _ in range(2)]
    signed = random.integers(-128, 128, (n, -(-k // 16)), np.int8)
    tables = random.integers(-128, 128, (-(-n // 16), 16), np.int8)
    scales = {
        "q4_k": (halves(256), halves(256), *small),
        "q5_k": (halves(256), halves(256), *small),
        "q6_k": (halves(256), signed),
        "q4_t": (halves(256).astype(np.float32), signed, tables),
        "q2_k": (halves(256), halves(256), *(random.integers(0, 16, (n, -(-k // 16)), np.uint8) for _ in range(2))),
        "q4_1": (halves(32), halves(32)),
        "q5_1": (halves(32), halves(32)),
    }.get(format, (halves(32),))
    return placed(kind.pack_blocks(codes, *scales)), kind.decode(codes, *scales)


@pytest.mark.parametrize("format", GROUPED)
@pytest.mark.parametrize(("n", "k"), [(112, 320), (203, 608), (7, 32)])
def test_published_groups_are_multiplied(isa, format, n, k) -> None:
    weight, values = published(format, n, k)
    x = random_bf16(np.random.default_rng(1), max(ROWS), k)
    expected = operand_product(isa, format, rows_of(format, x), values)
    found = multiply(isa, format, x, weight, n)
    assert_near(found, expected)
    for rows in ROWS[:-1]:
        assert np.array_equal(multiply(isa, format, x[:rows], weight, n, invariant=True), found[:rows])


@pytest.mark.skipif(len(FUSED) < 2, reason="one instruction set with fused multiply-add is here")
@pytest.mark.parametrize("format", GROUPED)
def test_bits_are_the_same_on_every_instruction_set_with_fma(format) -> None:
    weight, _ = published(format, 75, 608)
    x = random_bf16(np.random.default_rng(1), 9, 608)
    first, *others = (multiply(isa, format, x, weight, 75) for isa in ISAS if isa in FUSED)
    for other in others:
        assert np.array_equal(first, other)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_half_that_is_small_or_none_is_itself(isa, rows) -> None:
    """Scales of fp16 that are subnormal, and minima that are NaN or infinite."""
    codes = np.ones((16, 64), np.uint8)
    scales = np.full((16, 2), 2.0**-24, np.float16)
    minima = np.zeros((16, 2), np.float16)
    minima[3, 1], minima[5, 0] = np.nan, np.inf
    weight = placed(GROUPED["q4_1"].pack_blocks(codes, scales, minima))
    found = multiply(isa, "q4_1", np.ones((rows, 64), BF16), weight, 16)[-1]
    assert np.isinf(found[5])
    assert np.isinf(found[3]) if other_on_tiles(isa, "q4_1", rows) else np.isnan(found[3])
    assert np.allclose(np.delete(found, [3, 5]), 64 * 2.0**-24, rtol=1e-6)


@pytest.mark.parametrize("format", GROUPED)
@pytest.mark.parametrize("rows", [3, 40])
def test_an_outlier_spoils_only_the_inputs_of_its_group(isa, format, rows) -> None:
    """As models have them: a few inputs are a hundred times the others. The error is that of rounding 32 inputs in
    steps of the outlier, so a third of what rounding all of 256 would give.
    """
    n, k = 64, 512
    weight, values = published(format, n, k)
    x = random_bf16(np.random.default_rng(2), rows, k)
    x[:, 17::256] = 100
    operand = empty_rows(format, rows, k)
    output = aligned((rows, n), np.float32)
    rig = Rig(isa)
    rig.add(
        "quantise", input=placed(x), output=operand, width=k, input_stride=2 * k, output_stride=operand.strides[0],
        multiple=1, grouped=True,
    )  # fmt: skip
    rig.add(
        "gemm", format=format_of(format), input=operand, weight=weight, bias=None, output=output, columns=n, inputs=k,
        input_stride=operand.strides[0], output_stride=n, accumulate=False,
    )  # fmt: skip
    rig.run(rows)
    exact = x.astype(np.float64)
    steps = np.abs(exact).reshape(rows, -1, 32).max(axis=-1).repeat(32, axis=1) / 127
    rounding = np.sqrt((steps**2 / 12) @ (values.astype(np.float64) ** 2).T)
    assert np.linalg.norm(output - exact @ values.T) < 1.5 * np.linalg.norm(rounding)
