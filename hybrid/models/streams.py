"""A residual stream that is several streams (manifold-constrained hyper-connections): a property of the whole decoder.

Every half of a layer reads a weighted sum of the streams, and its result is spread over a mixture of them. The weights
of both are made of the streams of the token, by a small fp32 matrix for each half; rows and columns of the mixture are
made to sum to 1, in turn and a number of times. The head reads a weighted sum too, or the mean. The halves need not
know: they read COLLAPSED instead of RESIDUAL, and what they add to RESIDUAL is there alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

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


@dataclass(frozen=True)
class StreamNames:
    """Names in a checkpoint of what makes weights: a matrix, what is added to its products, and their factors."""

    matrix: str
    base: str
    scale: str


@dataclass(frozen=True)
class Streams:
    """count: of the streams. rounds: in which the mixture is balanced. floor: what keeps its sums above zero. mixer,
    feed_forward, head: names, the first two with the place of a layer; no head: it reads the mean of the streams.
    """

    count: int
    rounds: int
    floor: float
    mixer: StreamNames
    feed_forward: StreamNames
    head: StreamNames | None = None

    def inside(self, module: str) -> Self:
        """A copy whose tensors a checkpoint has in this module of the model."""
        mixer, feed_forward = inside(self.mixer, module), inside(self.feed_forward, module)
        return replace(self, mixer=mixer, feed_forward=feed_forward, head=self.head and inside(self.head, module))

    @property
    def weights(self) -> int:
        """Of a row and a half of a layer: those of the sum, those of the result, and the mixture."""
        return (2 + self.count) * self.count

    def _all(self, layers: int) -> Iterator[tuple[str, StreamNames, int, int]]:
        """How the names of the stored tensors begin, those of a checkpoint, weights and factors, in store order."""
        for layer in range(layers):
            yield f"layers.{layer}.mixer_streams", in_layer(self.mixer, layer), self.weights, 3
            yield f"layers.{layer}.ffn_streams", in_layer(self.feed_forward, layer), self.weights, 3
        if self.head:
            yield "head_streams", self.head, self.count, 1

    # Weights.

    def checkpoint_shapes(self, hidden: int, layers: int) -> Shapes:
        for _, names, weights, factors in self._all(layers):
            yield names.matrix, (weights, self.count * hidden)
            yield names.base, (weights,)
            yield names.scale, (factors,)

    def store_tensors(self, hidden: int, layers: int) -> Iterator[StoreTensor]:
        for prefix, names, weights, factors in self._all(layers):
            shard = Shard("outer").below(prefix)
            yield shard.floats("matrix", "router", Stacked((names.matrix,)), weights, self.count * hidden)
            yield shard.floats("base", "router", Stacked((names.base,)), weights)
            yield shard.floats("scale", "router", Stacked((names.scale,)), factors)

    # A step.

    def begin(self, place: Place) -> Op:
        """Every stream is the embedding."""
        return self._expand(place, "other", weighted=False)

    def around(self, place: Place, half: str, ops: Iterator[Op]) -> Iterator[Op]:
        """The ops of a half, its ops of streams before and behind them. half: "mixer" or "feed_forward"."""
        part, name = ("attention", "mixer") if half == "mixer" else ("moe", "ffn")
        yield from self._collapse(place, part, f"layers.{place.layer}.{name}_streams", self.weights)
        yield from ops
        yield self._expand(place, part, weighted=True)

    def end(self, place: Place) -> Iterator[Op]:
        """What the head reads."""
        yield from self._collapse(place, "head", "head_streams" if self.head else "", self.count)

    def _collapse(self, place: Place, part: str, prefix: str, weights: int) -> Iterator[Op]:
        """What is read, and the weights by which the result is spread. prefix: empty: the mean is read."""
        wide, stride = self.count * place.hidden, row_stride(self.count * place.hidden)
        if prefix:
            yield score(part, f"{prefix}.matrix", PRODUCTS, weights, wide, "weights", source=STREAMS)
        spreads = weights > self.count
        arguments = {
            "streams": Buffer(STREAMS),
            "products": Buffer(PRODUCTS) if prefix else None,
            "base": Weight(f"{prefix}.base") if prefix else None,
            "scale": Weight(f"{prefix}.scale") if prefix else None,
            "output": Buffer(COLLAPSED),
            "weights": Buffer(WEIGHTS) if spreads else None,
            "cleared": Buffer(RESIDUAL) if spreads else None,
            "count": self.count,
            "width": place.hidden,
            "stream_stride": stride,
            "output_stride": row_stride(place.hidden),
            "rounds": self.rounds,
            "eps": place.eps,
            "floor": self.floor,
        }
        yield Op("collapse", part, arguments, (0, "rows"))

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
        return Op("expand", part, arguments, (-(-place.hidden // BLOCK), "column blocks a row"))

    def buffers(self, hidden: int, rows: int) -> dict[str, int]:
        return {
            STREAMS: rows * row_stride(self.count * hidden) * FP32,
            COLLAPSED: rows * row_stride(hidden) * FP32,
            PRODUCTS: rows * self.weights * FP32,
            WEIGHTS: rows * (self.weights - self.count) * FP32,
        }

    def cost(self, hidden: int, layers: int, rows: int) -> Cost:
        """Of all halves and the head."""
        weights = 2 * layers * self.weights + (self.count if self.head else 0)
        products = float(weights * self.count * hidden)
        return Cost(products * FP32, 2.0 * products * rows)


def read_streams(fields: Fields) -> Streams:
    """Streams by the names of DeepSeek-V4, whose head reads their mean."""
    return Streams(
        fields.size("hc_mult", default=4, minimum=2, maximum=MAX_STREAMS),
        fields.size("hc_sinkhorn_iters", default=20, maximum=1000),
        fields.number("hc_eps", default=1e-6),
        mixer=stream_names("model.layers.{layer}.hc_attn"),
        feed_forward=stream_names("model.layers.{layer}.hc_ffn"),
    )


def stream_names(prefix: str) -> StreamNames:
    return StreamNames(f"{prefix}_fn", f"{prefix}_base", f"{prefix}_scale")
