"""Gated DeltaNet on a device: it projects, the threads convolve and correct the states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_f32
from torch.nn.functional import pad

from hybrid.formats.rows import row_stride
from hybrid.gpu.inputs import StepInputs
from hybrid.gpu.layers.base import Shared
from hybrid.gpu.loader import Loader
from hybrid.gpu.parts import NormWeights, norm
from hybrid.gpu.products import linear
from hybrid.models.layers.base import Place
from hybrid.models.layers.gated_delta import DECAYS, FOUND, PROJECTED, GatedDeltaNet
from hybrid.models.layers.products import rows_name


@dataclass(frozen=True)
class Weights:
    """Matrices bf16 [outputs, inputs]; decays, of betas and decays, float32 [2 * value_heads, hidden]."""

    norm: NormWeights
    into: Tensor
    decays: Tensor
    out: Tensor


def load(half: GatedDeltaNet, place: Place, load: Loader) -> Weights:
    at, hidden = f"layers.{place.layer}.delta", place.hidden
    return Weights(
        norm=load.norm(f"{at}.norm"),
        into=load.matrix(f"{at}.in", half.width, hidden),
        decays=load.floats(f"{at}.decays"),
        out=load.matrix(f"{at}.out", hidden, half.value_width),
    )


def whole_shape(half: GatedDeltaNet) -> None:
    """None: it has no attention."""


def open_half(half: GatedDeltaNet, place: Place, weights: Weights, shared: Shared) -> Projections:
    return Projections(half, place, weights, shared)


class Projections:
    """A `DeviceMixer`."""

    windows: frozenset[int | None] = frozenset()
    crosses = True

    def __init__(self, half: GatedDeltaNet, place: Place, weights: Weights, shared: Shared) -> None:
        self._half, self._eps, self._weights, self._shared = half, place.eps, weights, shared

    def sees_older(self, inputs: StepInputs) -> bool:
        return True

    def project(self, residual: Tensor, inputs: StepInputs) -> None:
        """What is convolved, the gates, and in fp32 what betas and decays are made of, sent to the threads."""
        weights, width = self._weights, self._half.width
        rows = norm(residual, weights.norm, self._eps)
        projected = pad(linear(rows.bfloat16(), weights.into), (0, row_stride(width) - width))
        self._send(PROJECTED, projected)
        self._send(DECAYS, linear_f32(rows, weights.decays))

    def mix(self, projected: None, inputs: StepInputs) -> None:
        """The threads do."""

    def output(self, mixed: None, inputs: StepInputs) -> Tensor:
        width = self._half.value_width
        name, stride = rows_name(FOUND, width), row_stride(width)
        rows = self._shared.link.to_device(self._shared.buffers.rows(name, torch.bfloat16, inputs.rows, stride))
        return linear(rows[:, :width], self._weights.out)

    def _send(self, name: str, rows: Tensor) -> None:
        self._shared.link.to_host(self._shared.buffers.rows(name, torch.float32, *rows.shape), rows)
