"""int8 activation rows are those of their definition bit for bit, and nothing is written beside them."""

from __future__ import annotations

import numpy as np
import pytest
from rig import BF16, Rig, aligned, int8_row_bytes, int8_row_parts, int8_rows, padded, random_bf16, row_stride

WIDTHS = [1, 16, 90, 256, 300, 601, 1000]
STRAY = 0xA5  # what lies in the output before


def quantise(isa, x: np.ndarray, *, rows: int, multiple: int = 1, threads: int = 1) -> np.ndarray:
    """The first rows * multiple of x by the op; checks that the others and the padding are left alone."""
    width = x.shape[1]
    output = aligned((len(x), int8_row_bytes(width)), np.uint8, fill=STRAY)
    inputs = padded(x)
    rig = Rig(isa, threads)
    rig.add(
        "quantise",
        input=inputs,
        output=output,
        width=row_stride(width),
        input_stride=inputs.strides[0],
        output_stride=output.strides[0],
        multiple=multiple,
    )
    rig.run(rows)
    used = int8_row_parts(width)[2].stop
    assert (output[rows * multiple :] == STRAY).all() and (output[:, used:] == STRAY).all()
    return output[: rows * multiple, :used]


def expected(x: np.ndarray) -> np.ndarray:
    return int8_rows(x)[:, : int8_row_parts(x.shape[1])[2].stop]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e30])
def test_rows_are_those_of_the_definition(isa, width, size) -> None:
    random = np.random.default_rng(width)
    x = (size * random.standard_normal((14, width)) * random.choice([1e-3, 1, 10], (14, 1))).astype(BF16)
    x[3] = 0
    for rows, multiple, threads in ((1, 1, 1), (7, 1, 2), (4, 3, 3)):
        actual = quantise(isa, x, rows=rows, multiple=multiple, threads=threads)
        assert np.array_equal(actual, expected(x[: rows * multiple]))


def test_halves_are_rounded_to_even_and_the_largest_is_127(isa) -> None:
    x = np.zeros((2, 300), BF16)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -126.5]
    x[1, 256:260] = [-2, 2, 1, -1]
    rows = quantise(isa, x, rows=2)
    assert rows[0, :8].view(np.int8).tolist() == [127, 0, 2, 2, 0, -2, -2, -126]
    assert rows[1, 256:260].view(np.int8).tolist() == [-127, 127, 64, -64]
    assert np.array_equal(rows, expected(x))


def test_numbers_too_small_for_a_scale_stay_small(isa) -> None:
    """127 over the largest is not finite below 4e-37: such rows stand for something no further off than zero is."""
    for size in (1e-39, 1e-38, 3e-37):
        x = np.full((1, 64), size, BF16)
        values, sums, scales = (quantise(isa, x, rows=1)[0, part] for part in int8_row_parts(64))
        units, scale = values.view(np.int8), scales.view(np.float32).astype(np.float64)
        assert sums.view(np.int32).tolist() == units.reshape(2, 32).sum(1, dtype=np.int32).tolist()
        assert np.abs(units * scale - float(x[0, 0])).max() <= float(x[0, 0])


@pytest.mark.parametrize("width", [16, 90, 300, 601])
@pytest.mark.parametrize("logit_rows", [False, True])
def test_a_norm_gives_the_rows_of_its_exact_result(isa, width, logit_rows) -> None:
    random = np.random.default_rng(width)
    rows, stride = 7, row_stride(width)
    x = aligned((rows, stride), np.float32)
    x[:, :width] = 30 * random.standard_normal((rows, width))
    weight = random.standard_normal(width).astype(np.float32)
    wanted = [6, 0, 3] if logit_rows else []
    count = len(wanted) if logit_rows else rows
    exact = aligned((rows, stride), np.float32)
    for threads in (1, 3):
        output8 = aligned((rows, int8_row_bytes(width)), np.uint8, fill=STRAY)
        rig = Rig(isa, threads)
        rig.add(
            "norm",
            input=x,
            weight=weight,
            output=None,
            output_f32=exact,
            output8=output8,
            width=width,
            input_stride=stride,
            output_stride=stride,
            output8_stride=output8.strides[0],
            eps=1e-6,
            logit_rows=logit_rows,
        )
        rig.run(rows, wanted)
        used = int8_row_parts(width)[2].stop
        assert exact[:count, :width].any(axis=1).all()
        assert np.array_equal(output8[:count, :used], expected(exact[:count, :width]))
        assert (output8[count:] == STRAY).all() and (output8[:, used:] == STRAY).all()


def test_int8_and_bf16_of_one_norm_are_of_one_value(isa) -> None:
    """A model with both kinds of format asks one norm for both."""
    random = np.random.default_rng(0)
    x = aligned((5, 128), np.float32)
    x[...] = random.standard_normal(x.shape)
    outputs = aligned((5, 128), BF16), aligned((5, 128), np.float32), aligned((5, int8_row_bytes(128)), np.uint8)
    rig = Rig(isa)
    rig.add(
        "norm",
        input=x,
        weight=np.ones(128, np.float32),
        output=outputs[0],
        output_f32=outputs[1],
        output8=outputs[2],
        width=128,
        input_stride=128,
        output_stride=128,
        output8_stride=outputs[2].strides[0],
        eps=1e-6,
        logit_rows=False,
    )
    rig.run(5)
    assert np.array_equal(outputs[0], outputs[1].astype(BF16))
    assert np.array_equal(outputs[2], int8_rows(outputs[1]))


def test_rows_of_noise_lose_less_than_half_a_step(isa) -> None:
    x = random_bf16(np.random.default_rng(2), 9, 300)
    rows = quantise(isa, x, rows=9)
    values, _, scales = int8_row_parts(300)
    steps = np.ascontiguousarray(rows[:, scales]).view(np.float32).repeat(256, axis=1)[:, :300].astype(np.float64)
    error = rows[:, values].view(np.int8)[:, :300] * steps - x.astype(np.float64)
    assert (np.abs(error) <= 0.5001 * steps).all()
