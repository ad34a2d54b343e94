"""A residual stream that is several streams (hyper-connections): a property of the whole decoder.

Every half of a layer reads something made of the streams, and its result is spread over them; the head reads something
made of them too. The halves need not know: they read COLLAPSED instead of RESIDUAL, and what they add to RESIDUAL is
there alone. What is read, and the weights of the result, are made of the streams of the token, in one of two ways:
`MixedStreams` here, and those of `gated_streams.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

from hybrid.formats.block import BLOCK
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, Place
from hybrid.models.layers.products import COLLAPSED, FP32, RESIDUAL, score
from hybrid.models.reading import Fields
from hybrid.models.tensors import Shapes, Shard, Stacked, StoreTensor, in_layer, inside
from hybrid.ops import Buffer, Op, Weight

# Buffers. PRODUCTS: of the streams of a row with a matrix. WEIGHTS: by which the streams take up the result of a half.
STREAMS, PRODUCTS, WEIGHTS = "streams", "stream_products", "stream_weights"
MAX_STREAMS = 8  # of what the kernels hold
Names = TypeVar("Names")


@dataclass(frozen=True)
class Streams(ABC, Generic[Names]):
    """count: of the streams. mixer, feed_forward, head: names in a checkpoint of what is made of them, the first two
    with the place of a layer; no head: it reads the mean of the streams.
    """

    count: int
    mixer: Names
    feed_forward: Names
    head: Names | None
    mixed: ClassVar[bool] = True  # whether a result is added to a mixture of the streams, or to each as it is

    def inside(self, module: str) -> Self:
        """A copy whose tensors a checkpoint has in this module of the model."""
        mixer, feed_forward = inside(self.mixer, module), inside(self.feed_forward, module)
        return replace(self, mixer=mixer, feed_forward=feed_forward, head=self.head and inside(self.head, module))

    def _all(self, places: Sequence[Place]) -> Iterator[tuple[str, Names, Place]]:
        """How the names of the stored tensors begin, those of a checkpoint, and the layer, in store order."""
        for place in places:
            yield f"layers.{place.layer}.mixer_streams", in_layer(self.mixer, place.layer), place
            yield f"layers.{place.layer}.ffn_streams", in_layer(self.feed_forward, place.layer), place
        if self.head:
            yield "head_streams", self.head, places[0]

    # Weights. places: of all layers.

    @abstractmethod
    def checkpoint_shapes(self, places: Sequence[Place]) -> Shapes:
        """Names and shapes of tensors in a checkpoint."""

    @abstractmethod
    def store_tensors(self, places: Sequence[Place]) -> Iterator[StoreTensor]:
        """Tensors of the packed store."""

    @abstractmethod
    def formats(self, places: Sequence[Place]) -> tuple[str, ...]:
        """Weight formats of the products."""

    # A step.

    def begin(self, place: Place) -> Op:
        """Every stream is the embedding."""
        return self._expand(place, "other", weighted=False)

    def around(self, place: Place, half: str, ops: Iterator[Op]) -> Iterator[Op]:
        """The ops of a half, its ops of streams before and behind them. half: "mixer" or "feed_forward"."""
        part, name = ("attention", "mixer") if half == "mixer" else ("moe", "ffn")
        yield from self._read(place, part, f"layers.{place.layer}.{name}_streams", spreads=True)
        yield from ops
        yield self._expand(place, part, weighted=True)

    def end(self, place: Place) -> Iterator[Op]:
        """What the head reads."""
        yield from self._read(place, "head", "head_streams" if self.head else "", spreads=False)

    @abstractmethod
    def _read(self, place: Place, part: str, prefix: str, spreads: bool) -> Iterator[Op]:
        """What is read, and if a result is spread its weights. prefix: of stored tensors; empty: the mean is read."""

    def _collapse(self, place: Place, part: str, spreads: bool, **own: Any) -> Op:
        """The op at the end of that. own: its arguments that are not of all streams."""
        arguments = {
            "streams": Buffer(STREAMS),
            "products": None,
            "base": None,
            "scale": None,
            "output": Buffer(COLLAPSED),
            "weights": None,
            "cleared": Buffer(RESIDUAL) if spreads else None,
            "count": self.count,
            "width": place.hidden,
            "stream_stride": row_stride(self.count * place.hidden),
            "output_stride": row_stride(place.hidden),
            "rounds": 0,
            "eps": place.eps,
            "floor": 0.0,
        }
        return Op("collapse", part, arguments | own, (0, "rows"))

    def _expand(self, place: Place, part: str, weighted: bool) -> Op:
        arguments = {
            "input": Buffer(RESIDUAL),
            "weights": Buffer(WEIGHTS) if weighted else None,
            "streams": Buffer(STREAMS),
            "count": self.count,
            "width": place.hidden,
            "input_stride": row_stride(place.hidden),
            "stream_stride": row_stride(self.count * place.hidden),
        }
        if not self.mixed:
            arguments["unmixed"] = True
        return Op("expand", part, arguments, (-(-place.hidden // BLOCK), "column blocks a row"))

    def buffers(self, places: Sequence[Place], rows: int) -> dict[str, int]:
        """Bytes of each buffer that a step of so many rows uses."""
        hidden = places[0].hidden
        return {
            STREAMS: rows * row_stride(self.count * hidden) * FP32,
            COLLAPSED: rows * row_stride(hidden) * FP32,
            WEIGHTS: rows * self.count * (1 + self.count * self.mixed) * FP32,
        }

    @abstractmethod
    def cost(self, places: Sequence[Place], rows: int) -> Cost:
        """Of all halves and the head."""


@dataclass(frozen=True)
class StreamNames:
    """Names in a checkpoint of what makes weights: a matrix, what is added to its products, and their factors."""

    matrix: str
    base: str
    scale: str


@dataclass(frozen=True)
class MixedStreams(Streams[StreamNames]):
    """A half reads a weighted sum of the streams, and its result is spread over a mixture of them (manifold-constrained
    hyper-connections). A small fp32 matrix for each half makes the weights of both; rows and columns of the mixture are
    made to sum to 1, in turn and in so many `rounds`. floor: what keeps its sums above zero.
    """

    rounds: int
    floor: float

    def _made(self, prefix: str) -> tuple[int, int]:
        """Weights that are made, and their factors: of the sum alone, or those of the result and the mixture too."""
        return (self.count, 1) if prefix == "head_streams" else ((2 + self.count) * self.count, 3)

    def checkpoint_shapes(self, places: Sequence[Place]) -> Shapes:
        for prefix, names, place in self._all(places):
            weights, factors = self._made(prefix)
            yield names.matrix, (weights, self.count * place.hidden)
            yield names.base, (weights,)
            yield names.scale, (factors,)

    def store_tensors(self, places: Sequence[Place]) -> Iterator[StoreTensor]:
        for prefix, names, place in self._all(places):
            shard, (weights, factors) = Shard("outer").below(prefix), self._made(prefix)
            yield shard.floats("matrix", "router", Stacked((names.matrix,)), weights, self.count * place.hidden)
            yield shard.floats("base", "router", Stacked((names.base,)), weights)
            yield shard.floats("scale", "router", Stacked((names.scale,)), factors)

    def formats(self, places: Sequence[Place]) -> tuple[str, ...]:
        """For the estimate of their time: fp32 takes that of bf16."""
        return ("bf16",)

    def _read(self, place: Place, part: str, prefix: str, spreads: bool) -> Iterator[Op]:
        own: dict[str, Any] = {"rounds": self.rounds, "floor": self.floor}
        if prefix:
            weights, wide = self._made(prefix)[0], self.count * place.hidden
            yield score(part, f"{prefix}.matrix", PRODUCTS, weights, wide, "weights", source=STREAMS)
            own |= {
                "products": Buffer(PRODUCTS),
                "base": Weight(f"{prefix}.base"),
                "scale": Weight(f"{prefix}.scale"),
                "weights": Buffer(WEIGHTS) if spreads else None,
            }
        yield self._collapse(place, part, spreads, **own)

    def buffers(self, places: Sequence[Place], rows: int) -> dict[str, int]:
        return super().buffers(places, rows) | {PRODUCTS: rows * self._made("")[0] * FP32}

    def cost(self, places: Sequence[Place], rows: int) -> Cost:
        weights = sum(self._made(prefix)[0] for prefix, _, _ in self._all(places))
        products = float(weights * self.count * places[0].hidden)
        return Cost(products * FP32, 2.0 * products * rows)


def read_streams(fields: Fields) -> MixedStreams:
    """Streams by the names of DeepSeek-V4, whose head reads their mean."""
    return MixedStreams(
        fields.size("hc_mult", default=4, minimum=2, maximum=MAX_STREAMS),
        stream_names("model.layers.{layer}.hc_attn"),
        stream_names("model.layers.{layer}.hc_ffn"),
        head=None,
        rounds=fields.size("hc_sinkhorn_iters", default=20, maximum=1000),
        floor=fields.number("hc_eps", default=1e-6),
    )


def stream_names(prefix: str) -> StreamNames:
    return StreamNames(f"{prefix}_fn", f"{prefix}_base", f"{prefix}_scale")
