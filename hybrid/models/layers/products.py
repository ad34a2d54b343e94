"""The ops around a matrix product, which every kind of layer is made of: norm, quantise, product; and their rows.

And the calls of a device around what a mixer leaves to the threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK
from hybrid.formats.packed import expert_bytes, matrix_formats, packed_bytes
from hybrid.formats.rows import RowKind, row_bytes, row_stride
from hybrid.models.layers.base import Cost, Place
from hybrid.models.tensors import Shapes, Shard, Stacked, StoreTensor, bias_name
from hybrid.ops import Buffer, Callback, Choice, Op, Weight

RESIDUAL, NORMED, NORMED_F32 = "residual", "normed", "normed_f32"
COLLAPSED = "collapsed"  # what halves read in place of RESIDUAL where that is several streams
UNNORMED = "unnormed"  # the constant weights that leave rows as they are, see `norm`
UNNORMED_WEIGHT = 2.0**40
MADE = "made"  # by a half whose result is normed before it is added to the residual stream
BF16, FP32 = 2, 4  # bytes


_SUFFIXES: dict[RowKind, str] = {"bf16": "", "int8": "8", "grouped": "_grouped", "wide": "_wide"}


def rows_name(name: str, width: int, kind: RowKind = "bf16") -> str:
    """Rows of different widths lie apart: what pads a row stays zero only if no wider row is ever written there."""
    return f"{name}{_SUFFIXES[kind]}.{width}"


def product_rows(name: str, width: int, format: str) -> tuple[Buffer, int]:
    """Where a product with weights of this format finds its rows, and bytes from one to the next."""
    kind = FORMATS[format].rows
    return Buffer(rows_name(name, width, kind)), row_bytes(width, kind)


def rows_buffers(name: str, width: int, format: str, rows: int) -> dict[str, int]:
    """Buffers of the rows of a product. A norm writes the kind that is read; others bf16, to be quantised."""
    kind = FORMATS[format].rows
    kinds: set[RowKind] = {kind} if name == NORMED else {kind, "bf16"}
    return {rows_name(name, width, kind): rows * row_bytes(width, kind) for kind in kinds}


def norm(
    place: Place, part: str, weight: str, *formats: str, f32: bool = False, last: bool = False, clears: bool = False
) -> Op:
    """Writes rows for the products with weights of `formats` that follow. clears: whether MADE becomes zero beside.

    weight: empty of rows that are not normed. They are divided by the root of an epsilon beside which their squares are
    nothing, and multiplied by the same: a power of two, so that no bit changes.
    """
    arguments = {
        "input": Buffer(COLLAPSED if place.streamed else RESIDUAL),
        "weight": Weight(weight) if weight else Buffer(UNNORMED),
        "output_f32": Buffer(NORMED_F32) if f32 else None,
        "width": place.hidden,
        "input_stride": row_stride(place.hidden),
        **norm_outputs(NORMED, place.hidden, *formats),
        "eps": place.eps if weight else UNNORMED_WEIGHT**2,
        "logit_rows": last,
    }
    if clears:
        arguments["cleared"] = Buffer(MADE)
    if place.norm in ("layer", "layer_unbiased") and weight:
        arguments["centred"] = True
    if place.norm == "layer" and weight:
        arguments["bias"] = Weight(f"{weight}_bias")
    return Op("norm", part, arguments, (0, "rows"))


def as_rows(
    part: str, source: Buffer, stride: int, weight: str, name: str, width: int, *formats: str, cleared: str = ""
) -> Op:
    """Floats of a buffer become rows of products as they are. weight: the buffer of `width` constants UNNORMED_WEIGHT.
    cleared: the buffer of floats of this width that becomes zero beside; empty: none.
    """
    arguments = {
        "input": source,
        "weight": Buffer(weight),
        "output_f32": None,
        "width": width,
        "input_stride": stride,
        **norm_outputs(name, width, *formats),
        "eps": UNNORMED_WEIGHT**2,
        "logit_rows": False,
    }
    if cleared:
        arguments["cleared"] = Buffer(cleared)
    return Op("norm", part, arguments, (0, "rows"))


def unnormed_constants(place: Place) -> dict[str, npt.NDArray[np.float32]]:
    """What `norm` reads where rows are not normed."""
    return {UNNORMED: np.full(place.hidden, UNNORMED_WEIGHT, np.float32)}


def unnormed_buffers(place: Place) -> dict[str, int]:
    return {UNNORMED: place.hidden * FP32}


def norm_outputs(name: str, width: int, *formats: str) -> dict[str, Any]:
    """The arguments of a norm that say where it writes rows for products with weights of `formats`."""
    rows = {FORMATS[format].rows: product_rows(name, width, format) for format in formats}
    (output, _), (output8, stride8) = (rows.get(kind, (None, 0)) for kind in ("bf16", "int8"))
    found = {"output": output, "output_stride": row_stride(width), "output8": output8, "output8_stride": stride8}
    for kind, (place, stride) in rows.items():
        if kind in ("grouped", "wide"):
            found |= {f"output_{kind}": place, f"output_{kind}_stride": stride}
    return found


def add_normed(
    place: Place,
    part: str,
    weight: str,
    source: str = MADE,
    target: str = RESIDUAL,
    adds: bool = True,
    factor: str = "",
) -> Op:
    """What a half made, normed, is added to the residual stream, or with others takes the place of what is there.

    factor: name of the number by which the sum is multiplied; empty: none.
    """
    plain = norm(place, part, weight).arguments
    arguments = {**plain, "input": Buffer(source), "output_f32": Buffer(target), "accumulate": adds}
    if factor:
        arguments["factor"] = Weight(factor)
    return Op("norm", part, arguments, (0, "rows"))


def made_buffers(place: Place, rows: int) -> dict[str, int]:
    return {MADE: rows * row_stride(place.hidden) * FP32}


def norm_shapes(place: Place, name: str) -> Shapes:
    """The tensors in a checkpoint of a norm of the residual stream, whose weight has this name; none without a name."""
    if not name:
        return
    yield name, (place.hidden,)
    if place.norm == "layer":
        yield bias_name(name), (place.hidden,)


def norm_tensors(place: Place, shard: Shard, name: str, source: str) -> Iterator[StoreTensor]:
    """The stored tensors of such a norm, as `norm` and `add_normed` read them."""
    if not source:
        return
    yield shard.floats(name, "norms", Stacked((source,), plus=place.norm_plus), place.hidden)
    if place.norm == "layer":
        yield shard.floats(f"{name}_bias", "norms", Stacked((source,), biases=True), place.hidden)


def quantise(part: str, name: str, width: int, format: str, multiple: int = 1) -> Iterator[Op]:
    """bf16 rows to others, where the product that reads them multiplies integers."""
    kind = FORMATS[format].rows
    if kind == "bf16":
        return
    arguments: dict[str, Any] = {
        "input": Buffer(rows_name(name, width)),
        "output": Buffer(rows_name(name, width, kind)),
        "width": row_stride(width),
        "input_stride": row_bytes(width, "bf16"),
        "output_stride": row_bytes(width, kind),
        "multiple": multiple,
    }
    if kind != "int8":
        arguments[kind] = True
    yield Op("quantise", part, arguments, (0, "rows"))


def gemm(
    part: str, format: str, source: str, weight: str, target: str | None, n: int, k: int, stride: int,
    bias: bool = False, accumulate: bool = False, scale: float = 1.0, first: int = 0,
) -> Op:  # fmt: skip
    """A product with a matrix [n, k]. target: None is the step's logits. stride: of its rows, in floats. scale: of the
    product and its bias. first: the column of the target at which it begins.
    """
    rows, input_stride = product_rows(source, k, format)
    arguments = {
        "format": Choice("Format", format),
        "input": rows,
        "weight": Weight(weight),
        "bias": Weight(f"{weight}_bias") if bias else None,
        "output": Buffer(target, first * FP32) if target else None,
        "columns": n,
        "inputs": row_stride(k),
        "input_stride": input_stride,
        "output_stride": stride,
        "accumulate": accumulate,
        "scale": scale,
    }
    return Op("gemm", part, arguments, (-(-n // BLOCK), "column blocks"))


def score(
    part: str, weight: str, target: str, count: int, width: int, what: str,
    source: str = NORMED_F32, bias: bool = False,
) -> Op:  # fmt: skip
    """A product in fp32 with `count` rows of `width` floats, as that of a router, of numbers that are few and that much
    depends on. target: float32 [rows, count]. what: they are.
    """
    arguments = {
        "input": Buffer(source),
        "weight": Weight(weight),
        "bias": Weight(f"{weight}_bias") if bias else None,
        "logits": Buffer(target),
        "experts": count,
        "hidden": width,
        "input_stride": row_stride(width),
    }
    return Op("router", part, arguments, (count, f"{what} a block of rows"))


def product_cost(format: str, n: int, k: int, rows: float) -> Cost:
    """Cost of reading a matrix [n, k] once and multiplying it with these rows."""
    return Cost(packed_bytes(format, n, k)) + operations(format, n * k * rows)


def expert_cost(format: str, hidden: int, intermediate: int, active: float, rows: float, wide: int = 2) -> Cost:
    """Cost of reading `active` experts once, and of `rows` rows over all of them."""
    first, second = matrix_formats(format)
    products = float(rows) * hidden * intermediate
    multiplied = operations(first, wide * products) + operations(second, products)
    return Cost(active * expert_bytes(format, hidden, intermediate, wide)) + multiplied


def operations(format: str, products: float) -> Cost:
    return Cost(int_ops=2.0 * products) if FORMATS[format].integer else Cost(flops=2.0 * products)


def between_calls(first: Op, *others: Op) -> Iterator[Op]:
    """Ops of a mixer that the threads do: the device begins in one callback, and goes on in the next."""
    assert first.layer is not None
    for kind, part, between in (("attend", first.part, (first, *others)), ("route", "moe", ())):
        call = {"call": Callback(kind, first.layer)}
        yield replace(first, kind="host", part=part, arguments=call, split=(1, "thread"))
        yield from between
