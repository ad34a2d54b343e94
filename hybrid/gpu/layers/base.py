"""What a step on a device asks of the halves of a layer, and what it gives them."""

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
    """What all halves share. sequences: that run together. capacity: tokens of each that are mirrored. attention: by
    which they attend where nothing is to be joined. choose: of a router's scores.
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
        """Of the mirrored tokens that its rows see: None is all of them."""

    def sees_older(self, inputs: StepInputs) -> bool:
        """Whether the threads must attend to tokens that are not mirrored."""

    def project(self, residual: Tensor, inputs: StepInputs) -> Any:
        """What is needed of its rows, of the residual stream float32 [rows, hidden]. The threads get what they need."""

    def mix(self, projected: Any, inputs: StepInputs) -> Any:
        """What rows take of other tokens, of the mirrored ones where there are older ones too."""

    def output(self, mixed: Any, inputs: StepInputs) -> Tensor:
        """What is added to the residual stream, float32 [rows, hidden], joined with what the threads made of older
        tokens.
        """


class DeviceFeedForward(Protocol):
    def normed(self, residual: Tensor) -> Tensor:
        """The rows that it reads, float32 [rows, hidden]."""

    def dense(self, normed: Tensor) -> Tensor | None:
        """What is added to the residual stream; None where there are experts."""

    def route(self, normed: Tensor) -> Routed:
        """Which experts rows take."""

    @property
    def has_shared(self) -> bool:
        """Whether an expert is shared by all rows."""

    def shared(self, normed: Tensor, routed: Routed) -> Tensor:
        """What that one adds."""


class Kind(Protocol):
    """A module of this folder."""

    def load(self, half: Any, place: Place, load: Loader) -> Any:
        """Weights on the device."""

    def open_half(self, half: Any, place: Place, weights: Any, shared: Shared) -> Any:
        """A DeviceMixer or a DeviceFeedForward."""

    def whole_shape(self, half: Any) -> tuple[int, int, int] | None:
        """Query heads, KV heads and their dimension, where it attends by `Shared.attention`; else None."""


def kind_of(half: Half) -> Kind:
    name = type(half).__module__.rpartition(".")[2]
    return cast(Kind, import_module(f"hybrid.gpu.layers.{name}"))
