"""A step whose experts are computed in two places: the device takes those that it holds, the threads the others.

Each MoE layer then asks `place` which experts are the device's, leaves them out of what the threads compute, has both
write what they made of a row to a place of its own, waits for the device in `join`, and adds all up in the order of the
step without a device (`combine`): results are the same bit for bit, wherever and whenever an expert was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from hybrid.formats.block import BLOCK
from hybrid.formats.mix import FormatMix
from hybrid.formats.rows import row_stride
from hybrid.models.layers.expert_sets import IDS, ROUTED, WEIGHTS
from hybrid.models.layers.feed_forward import TAKE, is_activation, is_routed
from hybrid.models.spec import ModelSpec
from hybrid.ops import Buffer, Callback, Op, RoutingTable, Weight, require_known

LEFT_IDS = "left_ids"  # the ids of the experts that the threads compute, -1 for those of the device
CONTRIBUTIONS = "contributions"  # what an expert made of a row, for each (row, rank); -0 between two layers
OBSERVE = "observe"  # the kind of the callback that reports the chosen experts
PLACED_CALLS = ("place", "join")  # kinds of callbacks of a step with a device
NEXT = "next_"  # prefix of the buffers of the next layer's router, which runs early


def observe_routes(ops: Iterable[Op]) -> Iterator[Op]:
    """The ops of a step that also calls `observe` after the experts of each MoE layer are chosen."""
    return _after_choice(ops, OBSERVE)


def take_routes(ops: Iterable[Op]) -> Iterator[Op]:
    """The ops of a step that first calls `take` there, which replaces the chosen experts."""
    return _after_choice(ops, TAKE)


def _after_choice(ops: Iterable[Op], kind: str) -> Iterator[Op]:
    moe = 0
    for op in ops:
        yield op
        if op.kind == "topk":
            yield _host(op, kind, moe, "other")
            moe += 1


def place_experts(ops: Iterable[Op], next_gate: bool = False) -> list[Op]:
    """The ops of a step with a device. next_gate: also run the next layer's router, on the same rows.

    Raises ValueError for an unknown op.
    """
    ops = require_known(ops)
    routers = [(router, topk) for router, topk in zip(ops, ops[1:], strict=False) if topk.kind == "topk"]
    placed: list[Op] = []
    moe = top_k = 0
    for op in ops:
        if op.kind == "group" and op.arguments["routing"] == RoutingTable(ROUTED):
            top_k = op.arguments["top_k"]
            if next_gate and moe + 1 < len(routers):
                placed += _ask_early(*routers[moe + 1], op.layer)
            placed += _place(op, moe)
        elif op.kind == "down" and op.arguments["routing"] == RoutingTable(ROUTED):
            placed += _down_and_join(op, moe, top_k)
            moe += 1
        else:
            placed.append(op)
    return placed


def placement_buffers(
    rows: int, top_k: int, spec: ModelSpec, mix: FormatMix, next_gate: bool = False
) -> dict[str, int]:
    """Bytes of the additional buffers of such a step."""
    pairs = rows * top_k
    width = max(spec.layers[layer].feed_forward.width(spec.place(layer, mix)) for layer in spec.moe_layers)
    sizes = {LEFT_IDS: pairs * 4, f"{ROUTED}.pairs": pairs * 4, CONTRIBUTIONS: pairs * row_stride(width) * 4}
    if not next_gate:
        return sizes
    scores = max(layer.feed_forward.scores for layer in spec.layers)
    early = {f"{NEXT}router_logits": rows * scores * 4, f"{NEXT}{IDS}": pairs * 4, f"{NEXT}{WEIGHTS}": pairs * 4}
    return sizes | early | {f"{NEXT}shared.weights": rows * 4}


def _place(group: Op, moe: int) -> Iterator[Op]:
    yield _host(group, "place", moe, "place")
    changes = {"ids": Buffer(LEFT_IDS), "weights": None, "pairs": Buffer(f"{ROUTED}.pairs")}
    yield replace(group, part="place", arguments=group.arguments | changes)


def _down_and_join(down: Op, moe: int, top_k: int) -> Iterator[Op]:
    """A shared expert is added last, as in the step without a device."""
    routed = {name: value for name, value in down.arguments.items() if name != "shared"}
    stride = routed["output_stride"]
    by_pair = {"routing": RoutingTable(ROUTED, "pairs"), "output": Buffer(CONTRIBUTIONS)}
    yield replace(down, arguments=routed | by_pair)
    yield _host(down, "join", moe, "join")
    sums = {
        "ids": Buffer(IDS),
        "weights": Buffer(WEIGHTS),
        "contributions": Buffer(CONTRIBUTIONS),
        "output": down.arguments["output"],
        "top_k": top_k,
        "width": down.arguments["blocks"] * BLOCK,
        "stride": stride,
        "output_stride": stride,
    }
    yield replace(down, kind="combine", part="join", arguments=sums, split=(0, "rows"))
    if "shared" in down.arguments:
        output = {"output": down.arguments["output"], "output_stride": stride}
        yield replace(down, arguments=down.arguments["shared"].arguments | output)


def _host(beside: Op, call: str, moe: int, part: str) -> Op:
    """A callback in the same half of a layer as another op."""
    arguments = {"call": Callback(call, moe)}
    return replace(beside, kind="host", part=part, arguments=arguments, split=(1, "thread"))


def _ask_early(router: Op, topk: Op, layer: int | None) -> Iterator[Op]:
    """The router of the next layer on the rows of this one, into buffers of its own."""
    for op in (router, topk):
        names = ("logits", "ids", "weights", "shared_weights")
        early = {name: _early(op.arguments[name]) for name in names if name in op.arguments}
        if op.kind == "router":
            early.pop("weights", None)
        yield replace(op, part="place", layer=layer, arguments=op.arguments | early)


def _early(value: Any) -> Any:
    return Buffer(NEXT + value.name) if isinstance(value, Buffer) else value


def device_ops(placed: Iterable[Op], slots: int) -> list[Op]:
    """What the device runs in each MoE layer, for a routing over slots: group, gate and up, down of the routed experts.

    Weights are references to the pieces of a slot, `Weight("experts")` and so on.
    """
    placed = list(placed)
    layer = next(op.layer for op in placed if is_routed(op))
    return [_on_slots(op, slots) for op in placed if op.layer == layer and (is_routed(op) or is_activation(op))]


def _on_slots(op: Op, slots: int) -> Op:
    shared = ("shared", "shared_output", "shared_output_stride")
    arguments = {name: _slot_piece(value) for name, value in op.arguments.items() if name not in shared}
    if op.kind == "group":
        arguments |= {"experts": slots}
    return replace(op, arguments=arguments, layer=None)


def _slot_piece(value: Any) -> Any:
    return Weight(value.name.rsplit(".", 1)[-1], value.offset) if isinstance(value, Weight) else value
