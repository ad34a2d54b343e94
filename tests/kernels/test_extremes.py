"""Every code of every format, at the ends of its range: sums that fp32 holds exactly must come out exactly."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from rig import (
    BF16,
    ISAS,
    Rig,
    aligned,
    dequantised_rows,
    format_of,
    other_on_tiles,
    packed,
    placed,
    row_stride,
    rows_of,
)

from hybrid.formats import FORMATS, FP8, GROUPED, MXFP4

ROWS = [3, 40]  # a stream of lines; panels of them


def assert_exact(isa, format, x, blocks, n) -> np.ndarray:
    """The product is that of what the operands stand for, to the last bit; returns it."""
    m, k = x.shape
    values = FORMATS[format].unpack(blocks, n, k).astype(np.float64)
    for first in (0, m - ROWS[0]):
        for rows in ROWS:
            part = rows_of(format, x[first : first + rows])
            if not (FORMATS[format].integer and other_on_tiles(isa, format, len(part))):
                assert np.array_equal(
                    multiply(isa, format, part, blocks, n, k), dequantised_rows(format, part, k) @ values.T
                )
    return values


def multiply(isa, format, rows, blocks, n, k) -> np.ndarray:
    """Rows as the format takes them times packed blocks: float32 [rows, n]."""
    output = aligned((len(rows), row_stride(n)), np.float32)
    rig = Rig(isa)
    rig.add(
        "gemm",
        format=format_of(format),
        input=rows,
        weight=placed(blocks),
        bias=None,
        output=output,
        columns=n,
        inputs=row_stride(k),
        input_stride=rows.strides[0],
        output_stride=row_stride(n),
        accumulate=False,
    )
    rig.run(len(rows))
    return output[:, :n]


def signs(rows: int, k: int, every: int) -> np.ndarray:
    """Rows of 1 and -1, `every` inputs apart and zero between, that together touch every input."""
    x = np.random.default_rng(k).choice([-1.0, 1.0], (rows, k))
    x[(np.arange(k) + np.arange(rows)[:, None]) % every != 0] = 0
    return x.astype(BF16)


@pytest.mark.parametrize("scale", [1.0, 2.0**-30, 2.0**30])
def test_every_code_of_fp8(isa, scale) -> None:
    n, k = 48, 300
    codes = np.resize([code for code in range(256) if code & 0x7F != 0x7F], n * k).astype(np.uint8)
    scales = np.float32(scale) * 2.0 ** np.arange(3, dtype=np.float32)[None]
    blocks = FP8.pack_blocks(codes.reshape(n, k).view(ml_dtypes.float8_e4m3fn), scales, 0)
    # from 2^-9 to 448 * 4: 20 bits, so that eight of them add up in 24
    values = assert_exact(isa, "fp8", signs(43, k, 40), blocks, n)
    assert len(np.unique(np.abs(values[:, :128]))) == 127


def test_every_code_and_exponent_of_mxfp4(isa) -> None:
    n, k = 32, 512
    exponents = np.resize(np.arange(3, 253), (n, k // 32)).astype(np.uint8)  # bf16 holds 0.5 and 6 times each of them
    codes = np.random.default_rng(0).permuted(np.resize(np.arange(16), (n, k // 32, 32)), axis=-1)
    blocks = MXFP4.pack_blocks((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8), exponents)
    x = np.zeros((k + 3, k), BF16)  # one input at a time: exponents so far apart do not add up exactly
    x[np.arange(k + 3), np.arange(k + 3) % k] = 1
    for first in range(0, k, 40):
        values = assert_exact(isa, "mxfp4", x[first : first + 43], blocks, n)
    assert np.isfinite(values).all() and len(np.unique(np.frexp(values)[1])) > 250


def test_sums_of_mxfp4_with_exponents_side_by_side(isa) -> None:
    n, k = 40, 256
    random = np.random.default_rng(1)
    exponents = random.integers(125, 130, (n, k // 32)).astype(np.uint8)
    blocks = MXFP4.pack_blocks(random.integers(0, 256, (n, k // 32, 16)).astype(np.uint8), exponents)
    assert_exact(isa, "mxfp4", signs(43, k, 1), blocks, n)


def full_rows(k: int) -> np.ndarray:
    """Rows at the ends of int8, which quantise to themselves: all 127, all -127, both by turns, at random, and less."""
    random = np.random.default_rng(k)
    x = random.choice([-127.0, 127.0], (43, k))
    x[0], x[1], x[2] = 127, -127, np.where(np.arange(k) % 2, 127, -127)
    x[30:40] = random.integers(-127, 128, (10, k))
    x[30:40, ::32] = 127
    return x.astype(BF16)


@pytest.mark.parametrize("k", [256, 600])
def test_every_code_of_int8(isa, k) -> None:
    codes = np.resize(np.arange(-127, 128), (48, k))
    codes[:2], codes[2:4], codes[4] = 127, -127, np.where(np.arange(k) % 2, 127, -127)
    codes[:, 3] = 127  # so that the scale is that of every column, exactly
    blocks = FORMATS["int8"].pack((codes * 0.125).astype(np.float32))
    values = assert_exact(isa, "int8", full_rows(k), blocks, 48)
    assert np.array_equal(values, codes * 0.125)


@pytest.mark.parametrize("sign", [1, -1])
def test_every_code_of_int4(isa, sign) -> None:
    k = 600
    codes = np.resize(np.arange(-8, 8), (48, k))
    codes[:2], codes[2:4], codes[4] = 7, -8, np.where(np.arange(k) % 2, 7, -8)
    codes[:, ::32] = -8  # so that the scale is that of every group, exactly; one of -0.25 makes 8 of it
    blocks = FORMATS["int4"].pack((sign * codes * 0.25).astype(np.float32))
    values = assert_exact(isa, "int4", full_rows(k), blocks, 48)
    assert np.array_equal(values, sign * codes * 0.25)


@pytest.mark.parametrize("format", GROUPED)
def test_the_ends_of_codes_in_groups(isa, format) -> None:
    """Sums of products may have but 16 bits for a while: of the largest codes and activations they hold all."""
    n, k = 64, 608
    kind, random = GROUPED[format], np.random.default_rng(0)
    codes, *scales = kind.quantise(np.ones((n, k), np.float32))
    scales = [np.ones_like(scale) for scale in scales]
    if format == "q4_t":
        scales[-1] = np.resize([-128, 127], scales[-1].shape).astype(np.int8)
    low, high = (-128, 127) if kind.bits == 8 else (0, (1 << kind.bits) - 1)
    made = random.choice([low, high], (n, k))
    made[:2], made[2:4], made[4] = high, low, np.where(np.arange(k) % 2, high, low)
    made[32:] = random.integers(low, high + 1, (n - 32, k))
    assert_exact(isa, format, full_rows(k), kind.pack_blocks(made.astype(codes.dtype), *scales), n)


@pytest.mark.skipif("amx" not in ISAS, reason="no matrix tiles here")
@pytest.mark.parametrize("k", [64, 600])
def test_int4_on_tiles_is_rounded_to_127ths_of_what_the_largest_scale_reaches(k) -> None:
    """Each column and 256 inputs have a step of 8/127 of their largest scale; scales may be negative or zero."""
    random = np.random.default_rng(k)
    n, padded = 48, row_stride(k)
    codes = np.full((n, padded), 8, np.uint8)
    codes[:, :k] = random.integers(0, 16, (n, k))
    scales = (random.choice([-1.0, 1.0], (n, padded // 32)) * random.uniform(0.01, 1, (n, padded // 32))).astype(BF16)
    scales[0], scales[1, 1:], scales[2] = 0, 0, BF16(2.0**-110)
    blocks = FORMATS["int4"].pack_blocks(codes, scales)
    wide = scales.astype(np.float64).repeat(32, axis=1)
    largest = np.abs(np.pad(wide, ((0, 0), (0, -padded % 256)))).reshape(n, -1, 256).max(axis=-1).repeat(256, axis=1)
    steps = np.maximum(largest[:, :padded], 2.0**-100) * 8 / 127
    products = (codes.astype(np.int64) - 8) * np.rint(wide / steps * 2048).astype(np.int64)
    even, odd = products * 16 + 2**14 >> 15, (products * 4096 + 2**14 >> 15) + 128 >> 8
    weights = np.where(np.arange(padded) % 2, odd, even) * steps
    rows = rows_of("int4", full_rows(k)[:40])
    x = dequantised_rows("int4", rows, k)
    expected = x @ weights[:, :k].T
    slack = 2.0**-20 * (np.abs(x) @ np.abs(weights[:, :k]).T)
    assert (np.abs(multiply("amx", "int4", rows, blocks, n, k) - expected) <= slack).all()
    assert np.abs(expected - x @ ((codes - 8.0) * wide)[:, :k].T).max() > 100 * slack.max()


@pytest.mark.skipif("amx" not in ISAS, reason="no matrix tiles here")
@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q5_0", "q6_k"])  # fp32 holds their weights, so bf16 rounds once
def test_codes_in_groups_are_rounded_to_bf16_on_tiles(format) -> None:
    n, k, rows = 48, 600, 40
    random = np.random.default_rng(1)
    blocks, weights = packed(
        format, (random.standard_normal((n, k)) * 2.0 ** random.integers(-9, 9, (n, 1))).astype(BF16)
    )
    rounded = (weights.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32).astype(np.float64)
    x = rows_of(format, random.standard_normal((rows, k)).astype(BF16))
    values = dequantised_rows(format, x, k, tiles=True)
    slack = 2.0**-18 * (np.abs(values) @ np.abs(rounded).T)
    assert (np.abs(multiply("amx", format, x, blocks, n, k) - values @ rounded.T) <= slack).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "bits", [0x7FFF, 0xFFFF, 0x7E00, 0x7C00], ids=hex
)  # rounded as they are, the first ones become zeros
def test_a_scale_that_is_none_shows(isa, bits, rows) -> None:
    n, k = 32, 64
    blocks, _ = packed("q8_0", np.ones((n, k), BF16))
    blocks.reshape(2, -1)[1].view(np.uint16)[5] = bits  # of the first 32 inputs of column 21
    made = multiply(isa, "q8_0", rows_of("q8_0", np.ones((rows, k), BF16)), blocks, n, k)
    assert not np.isfinite(made[:, 21]).any() and np.isfinite(np.delete(made, 21, axis=1)).all()
