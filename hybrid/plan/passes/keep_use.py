"""A step that leaves behind how many rows each expert of each layer got: every layer has offsets of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from hybrid.models.layers.expert_sets import ROUTED
from hybrid.models.layers.feed_forward import is_routed
from hybrid.models.spec import ModelSpec
from hybrid.ops import Op

OFFSETS = f"{ROUTED}.offsets"  # int32 [MoE layers, experts + 1]: the places of an expert's rows among all


def use_shape(spec: ModelSpec) -> tuple[int, int]:
    """MoE layers, and the experts of the one that has the most."""
    experts = [spec.layers[index].feed_forward.experts for index in spec.moe_layers]
    return len(experts), max(experts, default=0)


def use_buffers(spec: ModelSpec) -> dict[str, int]:
    """Bytes of the offsets of all layers."""
    layers, experts = use_shape(spec)
    return {OFFSETS: layers * (experts + 1) * 4} if layers else {}


def keep_use(ops: Iterable[Op], spec: ModelSpec) -> Iterator[Op]:
    """The same ops; those on the experts that rows chose read and write the offsets of their own layer."""
    starts = {layer: moe * (use_shape(spec)[1] + 1) * 4 for moe, layer in enumerate(spec.moe_layers)}
    for op in ops:
        if is_routed(op) and op.layer is not None:
            routing = replace(op.arguments["routing"], start=starts[op.layer])
            op = replace(op, arguments=op.arguments | {"routing": routing})
        yield op
