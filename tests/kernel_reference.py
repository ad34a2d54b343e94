"""The ops in double precision on the same rounded inputs, each with how far fp32 and bf16 may stray from it.

A bound follows from unit roundoffs and norms: a sum of k products in fp32 is off by k * 2^-24 * |x| . |w| at most,
a value stored as bf16 by 2^-8 of itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rig import SCALE_INPUTS, dequantised_rows, other_on_tiles

from hybrid.formats import GROUPED

FP32, BF16 = 2.0**-24, 2.0**-8  # unit roundoffs
EXP = 8 * FP32  # relative error of the kernels' exponential


@dataclass(frozen=True)
class Near:
    """Every element lies within `bound` of `value`; both float64."""

    value: np.ndarray
    bound: np.ndarray

    def __add__(self, other: np.ndarray) -> Near:
        """Add exact numbers in fp32."""
        value = self.value + other
        return Near(value, self.bound + FP32 * (np.abs(value) + self.bound))

    def __getitem__(self, part: slice) -> Near:
        return Near(self.value[part], self.bound[part])

    def as_bf16(self) -> Near:
        return Near(self.value, self.bound + BF16 * (np.abs(self.value) + self.bound))


def assert_near(actual: np.ndarray, expected: Near) -> None:
    """Fails with the worst element: where it is, what it is, what it should be and what was allowed."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.value.shape
    if actual.size == 0:
        return
    error = np.abs(actual - expected.value)
    share = np.where(error == 0, 0, error / np.maximum(expected.bound, np.finfo(np.float64).tiny))
    at = np.unravel_index(np.argmax(np.where(np.isnan(share), np.inf, share)), share.shape)
    assert share[at] <= 1, (
        f"worst element {tuple(map(int, at))}: {actual[at]!r}, expected {expected.value[at]!r}, "
        f"off by {error[at]:.3g} where {expected.bound[at]:.3g} is allowed"
    )


def product(x: np.ndarray, w: np.ndarray, roundings: int | None = None) -> Near:
    """x [m, k] times w [n, k]: [m, n]. roundings: of a term on its way into the sum; of a plain sum about k."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    roundings = x.shape[1] + 2 if roundings is None else roundings
    return Near(x @ w.T, roundings * FP32 * (np.abs(x) @ np.abs(w).T))


def format_product(format: str, x: np.ndarray, w: np.ndarray) -> Near:
    """The product with weights of a format, of what its operands stand for.

    Sums within a group are those of fp32, or exact integers; then each group is scaled and added to those before.
    Two roundings more for the scales of weights and rows, one for the value that the reference itself rounds.
    """
    k = x.shape[1]
    if format in GROUPED:
        return _grouped_product(x, w)
    group = {"fp8": 128, "fp8_row": 256, "int8": 256, "int4": 32, "mxfp4": 32, "nvfp4": 16}.get(format)
    if group is None:
        return product(x, w)
    within = min(k, group) if format.startswith("fp8") else 0
    return product(x, w, within + 2 * -(-k // group) + 4)


def operand_product(isa: str, format: str, rows: np.ndarray, w: np.ndarray) -> Near:
    """All rows of one product, as `rig.rows_of` makes them, times w [n, k], what weights of a format stand for."""
    tiles = other_on_tiles(isa, format, len(rows))
    x = dequantised_rows(format, rows, w.shape[1], tiles)
    if not tiles:
        return format_product(format, x, w)
    near = product(x, w) if format != "int4" else format_product("int8", x, w)
    return Near(near.value, near.bound + np.abs(x) @ rounded_on_tiles(format, w).T)


def rounded_on_tiles(format: str, w: np.ndarray) -> np.ndarray:
    """How far weights [n, k] are rounded where `other_on_tiles`: those of mxfp4 are not, codes in groups to bf16."""
    if format == "int4":
        return int4_half_steps(w)
    return np.abs(w) * (0 if format == "mxfp4" else BF16)


def int4_half_steps(w: np.ndarray) -> np.ndarray:
    """How far weights of int4 are rounded on tiles: to 127ths of 8 times the largest scale of a column's 256 inputs,
    which is the largest weight's if that has a code of 6 or more."""
    k = w.shape[1]
    parts = np.abs(np.pad(w.astype(np.float64), ((0, 0), (0, -k % SCALE_INPUTS)))).reshape(len(w), -1, SCALE_INPUTS)
    return np.repeat(parts.max(axis=-1) * (8 / 6 / 127 / 2), SCALE_INPUTS, axis=1)[:, :k]


def _grouped_product(x: np.ndarray, w: np.ndarray) -> Near:
    """Each group adds its scaled codes, none of which is negative, and its minimum times the sum of the row: both up to
    about twice the largest weight of the group, that of the other sign included.
    """
    k = w.shape[1]
    groups = np.abs(np.pad(w, ((0, 0), (0, -k % 32)))).reshape(len(w), -1, 32)
    largest = np.repeat(groups.max(axis=-1), 32, axis=1)[:, :k]
    return Near(x @ w.T, (2 * groups.shape[1] + 4) * FP32 * (np.abs(x) @ (4 * largest).T))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> Near:
    """Over the last axis. The sum of squares has no cancellation, so its relative error is that of its terms."""
    x = np.asarray(x, np.float64)
    value = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(weight, np.float64)
    return Near(value, (x.shape[-1] / 2 + 6) * FP32 * np.abs(value))


def silu_times(gate: Near, up: Near) -> Near:
    """silu(gate) * up; the slope of silu is at most 1.1."""
    silu = gate.value / (1 + np.exp(-gate.value))
    value = silu * up.value
    bound = 1.1 * gate.bound * (np.abs(up.value) + up.bound) + np.abs(silu) * up.bound
    return Near(value, bound + (EXP + 4 * FP32) * np.abs(value))


def swiglu_clamped(gate: Near, up: Near) -> Near:
    """gate * sigmoid(1.702 gate) * (up + 1), gate at most 7 and up within 7; clamping never adds to an error."""
    g, u = np.minimum(gate.value, 7), np.clip(up.value, -7, 7) + 1
    swish = g / (1 + np.exp(-1.702 * g))
    up_bound = up.bound + FP32 * np.abs(u)
    # The slope of g * sigmoid(1.702 g) is at most 1.1 as well; 1.702 and its product with g are rounded.
    bound = 1.1 * (gate.bound + 3 * FP32 * np.abs(g)) * (np.abs(u) + up_bound) + np.abs(swish) * up_bound
    return Near(swish * u, bound + (EXP + 6 * FP32) * np.abs(swish * u))


def gelu_tanh_times(gate: Near, up: Near) -> Near:
    """gelu(gate) * up, gelu by a tangent; its slope is at most 1.13. Where it vanishes its exponent is large, and so is
    what rounding does to that.
    """
    g = gate.value
    z = np.sqrt(8 / np.pi) * (g + 0.044715 * g**3)
    gelu = g / (1 + np.exp(-np.maximum(z, -700)))
    bound = 1.13 * gate.bound * (np.abs(up.value) + up.bound) + np.abs(gelu) * up.bound
    return Near(gelu * up.value, bound + (EXP + (6 + 5 * np.minimum(np.abs(z), 88)) * FP32) * np.abs(gelu * up.value))


def relu_squared(gate: Near, up: Near) -> Near:
    """The square of what of up is above zero; there is no gate."""
    positive = np.maximum(up.value, 0)
    return Near(positive**2, (2 * positive + up.bound) * up.bound + FP32 * positive**2)


def rotate(x: Near, table: np.ndarray, dim: int, interleaved: bool) -> Near:
    """Turn the first `dim` elements of x [..., head_dim] by table [dim]: cosines, then sines."""
    cos, sin = np.split(np.asarray(table, np.float64)[..., :dim], 2, axis=-1)
    first = slice(0, dim, 2) if interleaved else slice(0, dim // 2)
    second = slice(1, dim, 2) if interleaved else slice(dim // 2, dim)
    value, bound, size = x.value.copy(), x.bound.copy(), np.abs(x.value)
    a, b = x.value[..., first], x.value[..., second]
    value[..., first], value[..., second] = a * cos - b * sin, b * cos + a * sin
    both = x.bound[..., first] + x.bound[..., second] + 3 * FP32 * (size[..., first] + size[..., second])
    bound[..., first] = bound[..., second] = both * np.maximum(1, np.abs(cos) + np.abs(sin))
    return Near(value, bound)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, sinks: np.ndarray | None = None, cap: float = 0.0
) -> Near:
    """Queries [heads, dim] over the keys [n, dim] and values [n, size] that they see, as bf16 results [heads, size].

    sinks: a score for each head, of one key more whose value is zero. cap: scores are `cap * tanh(score / cap)`.
    Weights are rounded to bf16 independently, so their errors add up as a 2-norm does: four of them are allowed. Scales
    of keys and values round every score three times more and every weight twice.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores, sizes = q @ k.T * scale, np.abs(q) @ np.abs(k).T
    if cap:
        scores = cap * np.tanh(scores / cap)
        sizes = np.abs(scores) / scale
    if sinks is not None:
        scores = np.hstack([scores, sinks[:, None]])
        sizes = np.hstack([sizes, np.abs(sinks[:, None]) / scale])
        v = np.vstack([v, 0 * v[:1]])
    weights, largest = softmax(scores), np.abs(scores).max(-1, keepdims=True)
    score_error = (q.shape[1] + 3) * FP32 * scale * sizes.max(-1, keepdims=True) + 4 * FP32 * largest
    relative = 2 * score_error + 2 * EXP + (scores.shape[1] + 4) * FP32
    summed = weights @ np.abs(v)
    near = Near(weights @ v, 4 * BF16 * np.sqrt(weights**2 @ v**2) + relative * summed).as_bf16()
    return Near(near.value, near.bound + (6 * largest + 2) * FP32 * summed)
