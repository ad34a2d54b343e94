"""Lower bounds of what a step reads and multiplies, and so of its time on a machine."""

from __future__ import annotations

from collections.abc import Iterator

from hybrid.formats import FORMATS
from hybrid.formats.mix import FormatMix
from hybrid.models.layers.base import Cost, Load
from hybrid.models.layers.products import product_cost
from hybrid.models.spec import ModelSpec


def uses_integers(spec: ModelSpec, mix: FormatMix) -> bool:
    """Whether any product of the model multiplies 8-bit integers."""
    formats = {mix.head}.union(*(half.formats(place.mix) for place, half in spec.halves(mix)))
    return any(FORMATS[format].integer for format in formats)


def step_cost(
    spec: ModelSpec, mix: FormatMix, kv_format: str, sequences: int, rows: int, depth: int, logit_rows: int
) -> Cost:
    """Cost of one step in which each of `sequences` adds `rows` tokens behind `depth` earlier ones."""
    parts = part_costs(spec, mix, kv_format, sequences, rows, depth, logit_rows)
    return sum((cost for _, cost in parts), Cost())


def part_costs(
    spec: ModelSpec, mix: FormatMix, kv_format: str, sequences: int, rows: int, depth: int, logit_rows: int
) -> Iterator[tuple[tuple[str, ...], Cost]]:
    """The same by half of a layer and for the head, each with the formats of its weights."""
    pairs = sequences * (rows * depth + rows * (rows + 1) / 2)  # of a query and a key that it sees
    load = Load(sequences, sequences * rows, sequences * (depth + rows), pairs, kv_format)
    if logit_rows:
        yield (mix.head,), product_cost(mix.head, spec.vocab, spec.hidden, logit_rows)
    if spec.streams:
        places = spec.places(mix)
        yield spec.streams.formats(places), spec.streams.cost(places, load.rows)
    for place, half in spec.halves(mix):
        yield half.formats(place.mix), half.cost(place, load)
