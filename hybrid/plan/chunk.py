"""How many tokens of a prompt a step should have, by the balance of a machine: what it reads and what it multiplies.

A step reads an expert once, however many of its rows go there. C rows with k experts each touch E (1 - (1 - k/E)^C) of
E experts, which get C k/E rows each where all are touched; so long as these take less time than reading the expert, a
larger chunk costs nothing more. Attention costs a token the same in every chunk, but keys and values are read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hybrid.formats.mix import FormatMix
from hybrid.machine.rates import Rates
from hybrid.models.spec import ModelSpec
from hybrid.plan.roofline import part_costs

MOST = 8192  # tokens of a chunk, and of the prompt that it is chosen for
WITHIN = 1.05  # times as long as in the best chunk is fast enough
STEP_SECONDS = 2.0  # that a step may take where more than the fewest rows are chosen: whoever comes waits for it


@dataclass(frozen=True)
class Chunk:
    """Rows of a step, and why, to be said after their number."""

    rows: int
    why: str


def fastest_chunk(
    spec: ModelSpec, mix: FormatMix, kv_format: str, rates: Rates | None, least: int, length: int
) -> Chunk:
    """The smallest chunk that reads a prompt nearly as fast as any.

    least: the fewest rows to choose. length: tokens of a sequence at most. rates: None, or without operations, where
    they are not known: then the fewest are taken.
    """
    if rates is None or not rates.flops:
        return Chunk(least, "the operations of the machine are not known")
    known, prompt = rates, min(length, MOST)

    def seconds(rows: int) -> float:
        """Of a step in the middle of a prompt."""
        costs = part_costs(spec, mix, kv_format, 1, rows, max(0, prompt - rows) // 2, 0)
        return sum(known.seconds(cost) for _, cost in costs)

    a_token = {rows: seconds(rows) / rows for rows in _sizes(least, prompt)}
    best = min(a_token.values())
    rows = next(rows for rows, time in a_token.items() if time <= WITHIN * best)
    in_time = max(size for size in a_token if size == least or (size <= rows and size * a_token[size] <= STEP_SECONDS))
    if in_time < rows:
        return Chunk(in_time, f"steps of more would take above {STEP_SECONDS:g} s; {_measured(known)}")
    share = best / a_token[rows]
    return Chunk(rows, f"{share:.0%} of the speed of any{_rows_text(spec, rows)}; {_measured(known)}")


def _sizes(least: int, most: int) -> Iterator[int]:
    """From the fewest on, each a third or a half more than the one before."""
    yield least
    for power in range(MOST.bit_length()):
        for size in (1 << power, 3 << power >> 1):
            if least < size <= most:
                yield size


def _rows_text(spec: ModelSpec, rows: int) -> str:
    layers = [spec.layers[layer].feed_forward for layer in spec.moe_layers]
    if not layers:
        return ""
    return f", about {rows * spec.top_k / max(layer.experts for layer in layers):.0f} for an expert"


def _measured(rates: Rates) -> str:
    return f"the machine reads {rates.read / 1e9:.0f} GB/s and multiplies {rates.flops / 1e12:.2g} TFLOPS in bf16"
