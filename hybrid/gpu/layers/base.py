"""Interface of the halves of a layer on a device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor

from hybrid.gpu.attention_choice import Whole
from hybrid.gpu.buffers import SharedBuffers
from hybrid.gpu.inputs import StepInputs
from hybrid.gpu.link import Link
from hybrid.gpu.loader import Loader
from hybrid.gpu.parts import Choose, Routed
from hybrid.models.layers.base import Half, Place


@dataclass(frozen=True)
class Shared:
    """Shared by all halves. sequences: how many run together. capacity: mirrored tokens of each. attention: used when
    every seen token is mirrored. choose: top-k choice from a router's scores.
    """

    sequences: int
    capacity: int
    link: Link
    buffers: SharedBuffers
    attention: Whole
    choose: Choose


class DeviceMixer(Protocol):
    @property
    def windows(self) -> frozenset[int | None]:
        """Attention windows in use; None is unlimited."""

    @property
    def crosses(self) -> bool:
        """Whether the threads have a part in it in every step; else only where rows see older tokens."""

    def sees_older(self, inputs: StepInputs) -> bool:
        """Whether the threads have a part in this step, as to attend to tokens that are not mirrored."""

    def project(self, residual: Tensor, inputs: StepInputs) -> Any:
        """Projections of the residual stream, float32 [rows, hidden]; sends the threads what they need."""

    def mix(self, projected: Any, inputs: StepInputs) -> Any:
        """Attention over mirrored tokens, or what corresponds to it in other mixers."""

    def output(self, mixed: Any, inputs: StepInputs) -> Tensor:
        """What to add to the residual stream, float32 [rows, hidden], joined with the threads' result for older
        tokens.
        """


class DeviceFeedForward(Protocol):
    def normed(self, residual: Tensor) -> Tensor:
        """Normalised rows, its input, float32 [rows, hidden]."""

    def dense(self, normed: Tensor) -> Tensor | None:
        """What to add to the residual stream; None for a MoE layer."""

    def route(self, normed: Tensor) -> Routed:
        """The router's choice of experts for the rows."""

    @property
    def has_shared(self) -> bool:
        """Whether there is a shared expert, which all rows use."""

    def shared(self, normed: Tensor, routed: Routed) -> Tensor:
        """What the shared expert adds to the residual stream."""


class Kind(Protocol):
    """A module of this folder."""

    def load(self, half: Any, place: Place, load: Loader) -> Any:
        """Load the weights of a half onto the device."""

    def open_half(self, half: Any, place: Place, weights: Any, shared: Shared) -> Any:
        """A DeviceMixer or a DeviceFeedForward."""

    def whole_shape(self, half: Any) -> tuple[int, int, int] | None:
        """Query heads, KV heads and head dimension if it uses `Shared.attention`, else None."""


def kind_of(half: Half) -> Kind:
    name = type(half).__module__.rpartition(".")[2]
    return cast(Kind, import_module(f"hybrid.gpu.layers.{name}"))
