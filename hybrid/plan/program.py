"""The op list of a step: a flat sequence over named buffers and weights, the same for every step of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Literal

from hybrid.formats.block import BLOCK
from hybrid.formats.mix import FormatMix
from hybrid.formats.rows import pairs, row_stride
from hybrid.models.layers.base import AddsToStreams, Extents, Half, Place
from hybrid.models.layers.products import FP32, NORMED, RESIDUAL, gemm, norm, rows_buffers
from hybrid.models.spec import ModelSpec
from hybrid.ops import Buffer, Op, Weight


def build_buffers(spec: ModelSpec, mix: FormatMix, extents: Extents) -> dict[str, int]:
    """Bytes of every buffer of the arena. All layers share their intermediates, so each is as large as its largest user
    needs.
    """
    outer = {RESIDUAL: extents.rows * row_stride(spec.hidden) * FP32}
    head = rows_buffers(NORMED, spec.hidden, mix.head, extents.rows)
    if spec.streams:
        outer |= spec.streams.buffers(spec.places(mix), extents.rows)
    return largest([outer, head, *(half.buffers(place, extents) for place, half in spec.halves(mix))])


def largest(sizes: Iterable[dict[str, int]]) -> dict[str, int]:
    """Every name with the largest of its sizes."""
    found: dict[str, int] = {}
    for some in sizes:
        found |= {name: max(size, found.get(name, 0)) for name, size in some.items()}
    return found


def build_ops(spec: ModelSpec, mix: FormatMix) -> list[Op]:
    """Every op of a step, in order."""
    ops = [_embed(spec)]
    if spec.streams:
        ops.append(spec.streams.begin(spec.place(0, mix)))
    for place, half in spec.halves(mix):
        ops += (op for op in half.first_ops(place) if op not in ops)
    for index, layer in enumerate(spec.layers):
        place = spec.place(index, mix)
        ops += _half(spec, place, layer.mixer, "mixer")
        ops += _half(spec, place, layer.feed_forward, "feed_forward")
    return [*ops, *_head(spec, mix)]


def _half(spec: ModelSpec, place: Place, half: Half, name: Literal["mixer", "feed_forward"]) -> Iterator[Op]:
    ops = half.ops(place)
    if spec.streams:
        ops = spec.streams.around(place, name, ops)
    if isinstance(half, AddsToStreams):
        ops = chain(half.stream_ops(place), ops)
    return (replace(op, layer=place.layer, half=name) for op in ops)


def _embed(spec: ModelSpec) -> Op:
    arguments = {
        "table": Weight("embedding"),
        "output": Buffer(RESIDUAL),
        "hidden": spec.hidden,
        "pairs": pairs(spec.hidden),
        "output_stride": row_stride(spec.hidden),
        "scale": spec.embedding_scale,
    }
    return Op("embed", "other", arguments, (0, "rows"))


def _head(spec: ModelSpec, mix: FormatMix) -> Iterator[Op]:
    if spec.streams:
        yield from spec.streams.end(spec.place(0, mix))
    yield norm(spec.place(0, mix), "head", "final_norm" * bool(spec.names.final_norm), mix.head, last=True)
    yield gemm(
        "head", mix.head, NORMED, spec.head_weight(mix), None, spec.vocab, spec.hidden, spec.vocab,
        bias=spec.head_bias, scale=spec.logit_scale,
    )  # fmt: skip
    if spec.logit_cap:
        yield Op(
            "soft_cap",
            "head",
            {"columns": spec.vocab, "cap": spec.logit_cap},
            (-(-spec.vocab // BLOCK), "blocks a row"),
        )
