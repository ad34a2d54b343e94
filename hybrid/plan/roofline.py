"""What a step must read and multiply at least, and so the fastest that a machine could run it."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.formats import FORMATS
from hybrid.formats.mix import FormatMix
from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.plan.plan import kv_head_bytes
from hybrid.plan.program import feed_forward_format
from hybrid.weights.layout import expert_bytes, packed_bytes, qkv_width


@dataclass(frozen=True)
class Cost:
    """bytes: weights and KV that a step reads from memory, each once, as they are stored.

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


def uses_integers(spec: ModelSpec, mix: FormatMix) -> bool:
    """Whether any product of the model multiplies 8-bit integers."""
    formats = {mix.attention, mix.head, *(feed_forward_format(mix, layer) for layer in spec.layers)}
    if any(layer.feed_forward.shared_intermediate for layer in spec.layers):
        formats.add(mix.shared)
    return any(FORMATS[format].integer for format in formats)


def step_cost(
    spec: ModelSpec, mix: FormatMix, kv_format: str, sequences: int, rows: int, depth: int, logit_rows: int
) -> Cost:
    """Cost of one step in which each of `sequences` adds `rows` tokens behind `depth` earlier ones.

    Which experts are active is not known beforehand: their number is the expectation for even routing.
    """
    total = sequences * rows
    pairs = sequences * (rows * depth + rows * (rows + 1) / 2)  # of a query and a key that it sees
    cost = _matrix(mix.head, spec.vocab, spec.hidden, logit_rows) if logit_rows else Cost()
    for layer in spec.layers:
        cost += _projections(spec, mix.attention, layer, total)
        cost += _attention(layer, kv_format, sequences * (depth + rows), pairs)
        cost += _feed_forward(spec, feed_forward_format(mix, layer), layer, total)
        cost += _shared(spec, mix.shared, layer, total)
    return cost


def _matrix(format: str, n: int, k: int, rows: float) -> Cost:
    return Cost(packed_bytes(format, n, k)) + _operations(format, n * k * rows)


def _operations(format: str, products: float) -> Cost:
    return Cost(int_ops=2.0 * products) if FORMATS[format].integer else Cost(flops=2.0 * products)


def _projections(spec: ModelSpec, format: str, layer: LayerSpec, rows: int) -> Cost:
    attention = layer.attention
    into = _matrix(format, qkv_width(layer), spec.hidden, rows)
    return into + _matrix(format, spec.hidden, attention.heads * attention.head_dim, rows)


def _attention(layer: LayerSpec, kv_format: str, tokens: int, pairs: float) -> Cost:
    """Scores and weighted values, in floats whatever the format of keys and values."""
    attention = layer.attention
    read = tokens * attention.kv_heads * kv_head_bytes(layer, kv_format)
    return Cost(read, 4.0 * pairs * attention.heads * attention.head_dim)


def _feed_forward(spec: ModelSpec, format: str, layer: LayerSpec, rows: int) -> Cost:
    ffn = layer.feed_forward
    per_token, active = _experts(layer, rows)
    router = (ffn.experts + ffn.shared_gate) * spec.hidden
    experts = Cost(active * expert_bytes(format, spec.hidden, ffn.intermediate))
    experts += _operations(format, 3.0 * rows * per_token * spec.hidden * ffn.intermediate)
    return experts + Cost(4.0 * router, 2.0 * rows * router)


def _shared(spec: ModelSpec, format: str, layer: LayerSpec, rows: int) -> Cost:
    size = layer.feed_forward.shared_intermediate
    if not size:
        return Cost()
    return Cost(expert_bytes(format, spec.hidden, size)) + _operations(format, 3.0 * rows * spec.hidden * size)


def _experts(layer: LayerSpec, tokens: int) -> tuple[int, float]:
    """(experts of a token, experts that a step of `tokens` tokens touches)."""
    ffn = layer.feed_forward
    if not ffn.router:
        return 1, 1.0
    share = ffn.router.top_k / ffn.experts
    return ffn.router.top_k, ffn.experts * (1 - (1 - share) ** tokens)
