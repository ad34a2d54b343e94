"""What a step must read and multiply at least, and so the fastest that a machine could run it."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.models.spec import LayerSpec, ModelSpec


@dataclass(frozen=True)
class Cost:
    """bytes: weights and KV that a step reads from memory, each once. flops: multiplications and additions."""

    bytes: float
    flops: float

    def seconds(self, read_bytes_per_second: float, flops_per_second: float) -> float:
        """The shortest time of the step: the slower of reading and multiplying, perfectly overlapped."""
        return max(self.bytes / read_bytes_per_second, self.flops / flops_per_second)


def step_cost(spec: ModelSpec, sequences: int, rows: int, depth: int, logit_rows: int) -> Cost:
    """Cost of one step in which each of `sequences` adds `rows` tokens behind `depth` earlier ones.

    Which experts are active is not known beforehand: their number is the expectation for even routing.
    """
    total = rows * sequences
    head = spec.vocab * spec.hidden
    read, flops = 0.0, 2.0 * logit_rows * head
    for layer in spec.layers:
        dense, expert = _attention_parameters(spec, layer), 3 * spec.hidden * layer.feed_forward.intermediate
        router = layer.feed_forward.experts * spec.hidden
        per_token, active = _experts(layer, total)
        keys = rows * depth + rows * (rows + 1) / 2  # pairs of query and key, a sequence
        kv_width = 2 * layer.attention.kv_heads * layer.attention.head_dim
        read += 2 * (dense + active * expert) + 4 * router + 2 * sequences * (depth + rows) * kv_width
        flops += 2 * total * (dense + router + per_token * expert)
        flops += 4 * sequences * keys * layer.attention.heads * layer.attention.head_dim
    return Cost(read + (2 * head if logit_rows else 0), flops)


def _attention_parameters(spec: ModelSpec, layer: LayerSpec) -> int:
    attention = layer.attention
    return spec.hidden * attention.head_dim * 2 * (attention.heads + attention.kv_heads)


def _experts(layer: LayerSpec, tokens: int) -> tuple[int, float]:
    """(experts of a token, experts that a step of `tokens` tokens touches)."""
    ffn = layer.feed_forward
    if not ffn.router:
        return 1, 1.0
    share = ffn.router.top_k / ffn.experts
    return ffn.router.top_k, ffn.experts * (1 - (1 - share) ** tokens)
