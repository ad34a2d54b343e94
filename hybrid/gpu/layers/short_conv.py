"""A gated short convolution on a device: it projects, the threads convolve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hybrid.formats.rows import row_stride
from hybrid.gpu.inputs import StepInputs
from hybrid.gpu.layers.base import Shared
from hybrid.gpu.loader import Loader
from hybrid.gpu.parts import NormWeights, norm
from hybrid.gpu.products import linear
from hybrid.models.layers.base import Place
from hybrid.models.layers.products import rows_name
from hybrid.models.layers.short_conv import CONVOLVED, GATES, ShortConv


@dataclass(frozen=True)
class Weights:
    """Matrices bf16 [outputs, inputs], biases float32."""

    norm: NormWeights
    into: Tensor
    into_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None


def load(half: ShortConv, place: Place, load: Loader) -> Weights:
    at, hidden = f"layers.{place.layer}.conv", place.hidden
    return Weights(
        norm=load.norm(f"{at}.norm"),
        into=load.matrix(f"{at}.in", 3 * half.width, hidden),
        into_bias=load.some_floats(f"{at}.in_bias", 3 * half.width),
        out=load.matrix(f"{at}.out", hidden, half.width),
        out_bias=load.some_floats(f"{at}.out_bias", hidden),
    )


def whole_shape(half: ShortConv) -> None:
    """None: it has no attention."""


def open_half(half: ShortConv, place: Place, weights: Weights, shared: Shared) -> Projections:
    return Projections(half, place, weights, shared)


class Projections:
    """A `DeviceMixer`."""

    windows: frozenset[int | None] = frozenset()
    crosses = True

    def __init__(self, half: ShortConv, place: Place, weights: Weights, shared: Shared) -> None:
        self._width, self._eps, self._weights, self._shared = half.width, place.eps, weights, shared

    def sees_older(self, inputs: StepInputs) -> bool:
        return True

    def project(self, residual: Tensor, inputs: StepInputs) -> None:
        """What goes into the convolution, sent to the threads."""
        weights, stride = self._weights, row_stride(3 * self._width)
        rows = norm(residual, weights.norm, self._eps).bfloat16()
        gates = pad(linear(rows, weights.into, weights.into_bias), (0, stride - 3 * self._width))
        self._shared.link.to_host(self._shared.buffers.rows(GATES, torch.float32, *gates.shape), gates)

    def mix(self, projected: None, inputs: StepInputs) -> None:
        """The threads do."""

    def output(self, mixed: None, inputs: StepInputs) -> Tensor:
        weights, stride = self._weights, row_stride(self._width)
        name = rows_name(CONVOLVED, self._width)
        rows = self._shared.link.to_device(self._shared.buffers.rows(name, torch.bfloat16, inputs.rows, stride))
        return linear(rows[:, : self._width], weights.out, weights.out_bias)
