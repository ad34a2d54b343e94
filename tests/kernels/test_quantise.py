"""Activation rows of whole numbers are those of their definition bit for bit, and nothing is written beside them."""

from __future__ import annotations

import numpy as np
import pytest
from rig import (
    BF16,
    Rig,
    aligned,
    int8_row_parts,
    padded,
    quantise_kind,
    quantised_row_bytes,
    quantised_rows,
    random_bf16,
    row_steps,
    row_stride,
    used_bytes,
    whole_numbers,
)

WIDTHS = [1, 16, 90, 256, 300, 601, 1000]
STRAY = 0xA5  # what lies in the output before


@pytest.fixture(params=["int8", "grouped", "wide"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def quantise(isa, kind: str, x: np.ndarray, *, rows: int, multiple: int = 1, threads: int = 1) -> np.ndarray:
    """The first rows * multiple of x by the op; checks that the others and the padding are left alone."""
    width = x.shape[1]
    output = aligned((len(x), quantised_row_bytes(width, kind)), np.uint8, fill=STRAY)
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
        **quantise_kind(kind),
    )
    rig.run(rows)
    used = used_bytes(width, kind)
    assert (output[rows * multiple :] == STRAY).all() and (output[:, used:] == STRAY).all()
    return output[: rows * multiple, :used]


def expected(kind: str, x: np.ndarray) -> np.ndarray:
    return quantised_rows(kind, x)[:, : used_bytes(x.shape[1], kind)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e30])
def test_rows_are_those_of_the_definition(isa, kind, width, size) -> None:
    random = np.random.default_rng(width)
    x = (size * random.standard_normal((14, width)) * random.choice([1e-3, 1, 10], (14, 1))).astype(BF16)
    x[3] = 0
    for rows, multiple, threads in ((1, 1, 1), (7, 1, 2), (4, 3, 3)):
        actual = quantise(isa, kind, x, rows=rows, multiple=multiple, threads=threads)
        assert np.array_equal(actual, expected(kind, x[: rows * multiple]))


def test_halves_are_rounded_to_even_and_the_largest_is_127(isa, kind) -> None:
    if kind == "wide":
        pytest.skip("its whole numbers go further")
    x = np.zeros((2, 300), BF16)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -126.5]
    x[1, 256:260] = [-2, 2, 1, -1]
    rows = quantise(isa, kind, x, rows=2)
    assert whole_numbers(rows, 300, kind)[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, -126]
    assert whole_numbers(rows, 300, kind)[1, 256:260].tolist() == [-127, 127, 64, -64]
    assert np.array_equal(rows, expected(kind, x))


def test_numbers_too_small_for_a_scale_stay_small(isa, kind) -> None:
    """127 over the largest is not finite below 4e-37: such rows stand for something no further off than zero is."""
    for size in (1e-39, 1e-38, 3e-37):
        x = np.full((1, 64), size, BF16)
        rows = quantise(isa, kind, x, rows=1)
        units, steps = whole_numbers(rows, 64, kind), row_steps(rows, 64, kind).astype(np.float64)
        if kind == "int8":
            sums = rows[0, int8_row_parts(64)[1]].view(np.int32)
            assert sums.tolist() == units.reshape(2, 32).sum(1, dtype=np.int32).tolist()
        assert np.abs(units * steps - float(x[0, 0])).max() <= float(x[0, 0])


@pytest.mark.parametrize("width", [16, 90, 300, 601])
@pytest.mark.parametrize("logit_rows", [False, True])
def test_a_norm_gives_the_rows_of_its_exact_result(isa, kind, width, logit_rows) -> None:
    random = np.random.default_rng(width)
    rows, stride = 7, row_stride(width)
    x = aligned((rows, stride), np.float32)
    x[:, :width] = 30 * random.standard_normal((rows, width))
    weight = random.standard_normal(width).astype(np.float32)
    wanted = [6, 0, 3] if logit_rows else []
    count = len(wanted) if logit_rows else rows
    exact = aligned((rows, stride), np.float32)
    for threads in (1, 3):
        output = aligned((rows, quantised_row_bytes(width, kind)), np.uint8, fill=STRAY)
        name = "output8" if kind == "int8" else f"output_{kind}"
        places = {"output8": None, "output8_stride": 0, name: output, f"{name}_stride": output.strides[0]}
        rig = Rig(isa, threads)
        rig.add(
            "norm",
            input=x,
            weight=weight,
            output=None,
            output_f32=exact,
            width=width,
            input_stride=stride,
            output_stride=stride,
            eps=1e-6,
            logit_rows=logit_rows,
            **places,
        )
        rig.run(rows, wanted)
        used = used_bytes(width, kind)
        assert exact[:count, :width].any(axis=1).all()
        assert np.array_equal(output[:count, :used], expected(kind, exact[:count, :width]))
        assert (output[count:] == STRAY).all() and (output[:, used:] == STRAY).all()


def test_all_rows_of_one_norm_are_of_one_value(isa) -> None:
    """A model with formats of all kinds asks one norm for all."""
    random = np.random.default_rng(0)
    x = aligned((5, 128), np.float32)
    x[...] = random.standard_normal(x.shape)
    outputs = aligned((5, 128), BF16), aligned((5, 128), np.float32)
    kinds = {kind: aligned((5, quantised_row_bytes(128, kind)), np.uint8) for kind in ("int8", "grouped", "wide")}
    rig = Rig(isa)
    rig.add(
        "norm",
        input=x,
        weight=np.ones(128, np.float32),
        output=outputs[0],
        output_f32=outputs[1],
        output8=kinds["int8"],
        output_grouped=kinds["grouped"],
        width=128,
        input_stride=128,
        output_stride=128,
        output8_stride=kinds["int8"].strides[0],
        output_grouped_stride=kinds["grouped"].strides[0],
        output_wide=kinds["wide"],
        output_wide_stride=kinds["wide"].strides[0],
        eps=1e-6,
        logit_rows=False,
    )
    rig.run(5)
    assert np.array_equal(outputs[0], outputs[1].astype(BF16))
    for kind, rows in kinds.items():
        assert np.array_equal(rows, quantised_rows(kind, outputs[1]))


def test_rows_of_noise_lose_less_than_half_a_step(isa, kind) -> None:
    x = random_bf16(np.random.default_rng(2), 9, 300)
    rows = quantise(isa, kind, x, rows=9)
    steps = row_steps(rows, 300, kind).astype(np.float64)
    error = whole_numbers(rows, 300, kind) * steps - x.astype(np.float64)
    assert (np.abs(error) <= 0.5001 * steps).all()
