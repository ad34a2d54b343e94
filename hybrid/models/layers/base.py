"""Interface of a layer kind: what the packer, planner, engine and device need from it.

A decoder layer has two halves: a mixer, which looks at other tokens (attention and its like), and a feed-forward.
A kind of either is a frozen dataclass with the methods of `Half`, in a file of its own. No other code depends
on its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from hybrid.formats.mix import FormatMix
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import ExpertForm, Shapes, Shard, StoreTensor
from hybrid.ops import Op

# The norms of a model: RMSNorms; the same whose checkpoints have their weights less 1; or of the residual stream
# LayerNorms with a bias, or without.
NormKind = Literal["rms", "rms_less_one", "layer", "layer_unbiased"]
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """What a half needs to know of the model around it.

    layer: its number. hidden: width of the residual stream. eps: of the norms. ropes: of the whole model, a table each.
    norm: the kind of its norms. streamed: whether its residual stream is several streams.
    """

    layer: int
    hidden: int
    eps: float
    mix: FormatMix
    ropes: tuple[RopeSpec, ...] = ()
    norm: NormKind = "rms"
    streamed: bool = False

    @property
    def norm_plus(self) -> float:
        """What is added to the weight of a norm when it is packed."""
        return 1.0 if self.norm == "rms_less_one" else 0.0


@dataclass(frozen=True)
class Extents:
    """The largest step: its rows, the sequences that run together, and the tokens of one."""

    rows: int
    sequences: int
    tokens: int


@dataclass(frozen=True)
class StateLayout:
    """Layout of a mixer's state of one sequence, which is zeroed when the sequence begins.

    nbytes: in all. token_bytes: per token, 0 if the state does not grow. binding: the class of `cpu_kernels` that
    describes it to the kernels, constructed from `base`, `sequence_stride` and `fields`. runs: (offset, bytes) of its
    parts that grow, each contiguous and of as many bytes for every token. fixed: the same of those beside them that do
    not. run: of a state that changes, the tokens of a run: a sequence goes back to those of the run that its newest
    token is in, and to no earlier one; None: to any.
    """

    nbytes: int
    token_bytes: int
    binding: str
    fields: Mapping[str, Any]
    runs: tuple[tuple[int, int], ...] = ()
    run: int | None = None
    fixed: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Cost:
    """bytes: weights and state that a step reads from memory, each once, as they are stored.

    flops, int_ops: multiplications and additions of floating-point numbers and of 8-bit integers.
    """

    bytes: float = 0.0
    flops: float = 0.0
    int_ops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.int_ops + other.int_ops)

    def seconds(self, read_bytes_per_second: float, flops_per_second: float, int_ops_per_second: float = 0.0) -> float:
        """The shortest time of the step: the slower of reading and multiplying, perfectly overlapped.

        Floats and integers share the cores, so their times add up. The integer rate matters only with int_ops.
        """
        multiplying = self.flops / flops_per_second
        if self.int_ops:
            multiplying += self.int_ops / int_ops_per_second
        return max(self.bytes / read_bytes_per_second, multiplying)


@dataclass(frozen=True)
class Load:
    """Sizes of a step: sequences, rows, tokens in the states, and pairs of a row and a token that it sees."""

    sequences: int
    rows: int
    tokens: int
    pairs: float
    kv_format: str


@dataclass(frozen=True)
class DeviceNeeds:
    """What a device must hold to compute this half of a step.

    weights: bytes. token: bytes of each mirrored token. row_floats: number of fp32 intermediates of a row. scores:
    number of attention scores of a row for each key.
    """

    weights: int
    token: int
    row_floats: int
    scores: int


class Half(Protocol):
    """Half of a decoder layer."""

    @property
    def rope(self) -> RopeSpec | None:
        """Its rotary embedding, None without one."""

    def inside(self, module: str) -> Self:
        """A copy whose tensors a checkpoint has in this module of the model: `model.x` as `model.module.x`."""

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        """Names and shapes of its tensors in a checkpoint whose experts have this form."""

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        """Tensors of the packed store, in the order a step reads them."""

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        """Weight formats of its products."""

    def first_ops(self, place: Place) -> Iterator[Op]:
        """Ops to run before the first layer. Equal ops of several layers run once."""

    def ops(self, place: Place) -> Iterator[Op]:
        """Ops from reading the residual stream to adding to it."""

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        """Bytes of each buffer that it uses. Layers share them: a buffer is as large as its largest user needs."""

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        """Buffers that are written once, when the engine opens."""

    def cost(self, place: Place, load: Load) -> Cost:
        """Lower bound of what a step reads and multiplies."""

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        """What a device must hold for it; None if no device supports this kind."""

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        """The ops that are left to the threads when a device computes it. ops: from `ops`, with or without placed
        experts.

        Raises ValueError for an unknown op.
        """

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        """Bytes of the additional buffers that threads and device share."""


@runtime_checkable
class AddsToStreams(Protocol):
    """A half that adds to the streams of the residual before it reads any."""

    def stream_ops(self, place: Place) -> Iterator[Op]:
        """The ops that do."""


class Mixer(Half, Protocol):
    """The half that looks at other tokens."""

    def within(self, tokens: int) -> Mixer:
        """What computes the same, and no more than is needed, where no sequence has more than so many tokens."""

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        """Layout of the state of one sequence of `tokens` tokens."""


def as_kind(kind: type[T], half: Half, **more: Any) -> T:
    """A half as another kind that has its fields and `more`, or only some of them."""
    names = {own.name for own in fields(kind)}  # type: ignore[arg-type]
    known = {own.name: getattr(half, own.name) for own in fields(half) if own.name in names}  # type: ignore[arg-type]
    return kind(**known, **more)
