"""A step whose experts are computed in two places: the device takes those that it holds, the threads the others.

Each MoE layer then asks `place` which experts are the device's, leaves them out of what the threads compute, has both
write what they made of a row to a place of its own, waits for the device in `join`, and adds all up in the order of the
step without a device (`combine`): results are the same bit for bit, wherever and whenever an expert was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.spec import ModelSpec
from hybrid.ops import Buffer, Callback, Op, RoutingTable, Weight
from hybrid.plan.program import row_stride
from hybrid.weights.layout import BLOCK, StoreTensor

ROUTED = "routing"  # of the experts that a row chooses among
IDS, WEIGHTS = "expert_ids", "expert_weights"
LEFT_IDS = "left_ids"  # the ids of the experts that the threads compute, -1 for those of the device
CONTRIBUTIONS = "contributions"  # what an expert made of a row, for each (row, rank); -0 between two layers
TAKE = "take"  # the kind of the callback that replaces what a router chose
NEXT = "next_"  # before the buffers of the router of the next layer, which is asked early


@dataclass(frozen=True)
class ExpertShape:
    """What the experts of all MoE layers have in common: how many there are, how many a row takes, and their bytes.

    pieces: (last word of the tensor, bytes of one expert), the matrices first. weights: numbers in its matrices.
    """

    layers: tuple[int, ...]  # those of the model that have experts
    experts: int
    top_k: int
    pieces: tuple[tuple[str, int], ...]
    weights: int

    @property
    def nbytes(self) -> int:
        """Of one expert, biases included."""
        return sum(size for _, size in self.pieces)


def expert_shape(spec: ModelSpec, tensors: dict[str, StoreTensor]) -> ExpertShape:
    """Raises ConfigError for a model without experts, or with experts of several sizes."""
    layers = [index for index, layer in enumerate(spec.layers) if layer.feed_forward.is_moe]
    if not layers:
        raise ConfigError(f"model_type {spec.model_type!r} has no experts to cache; use --device cpu")
    shapes = {_layer_shape(spec, index, tensors) for index in layers}
    if len(shapes) > 1:
        raise ConfigError("the layers have experts of several sizes, which one cache cannot hold; use --device cpu")
    return replace(shapes.pop(), layers=tuple(layers))


def _layer_shape(spec: ModelSpec, index: int, tensors: dict[str, StoreTensor]) -> ExpertShape:
    ffn = spec.layers[index].feed_forward
    assert ffn.router is not None
    names = ["experts", "gate_up_bias", "down_bias"]
    found = [(name, tensors.get(f"layers.{index}.ffn.{name}")) for name in names]
    pieces = tuple((name, tensor.nbytes // ffn.experts) for name, tensor in found if tensor)
    return ExpertShape((), ffn.experts, ffn.router.top_k, pieces, 3 * spec.hidden * ffn.intermediate)


def observe_routes(ops: Iterable[Op]) -> Iterator[Op]:
    """The ops of a step that calls `observe` once the experts of a MoE layer are chosen, and changes nothing."""
    return _after_choice(ops, "observe")


def take_routes(ops: Iterable[Op]) -> Iterator[Op]:
    """The ops of a step that calls `take` there, before all others: to have other experts in the place of those."""
    return _after_choice(ops, TAKE)


def _after_choice(ops: Iterable[Op], kind: str) -> Iterator[Op]:
    moe = 0
    for op in ops:
        yield op
        if op.kind == "topk":
            yield Op("host", "other", {"call": Callback(kind, moe)}, (1, "thread"), op.layer)
            moe += 1


def place_experts(ops: Iterable[Op], next_gate: bool = False) -> list[Op]:
    """The ops of a step with a device. next_gate: ask the router of the next layer too, on the same rows."""
    ops = list(ops)
    routers = [(router, topk) for router, topk in zip(ops, ops[1:], strict=False) if router.kind == "router"]
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


def placement_buffers(rows: int, top_k: int, spec: ModelSpec, next_gate: bool = False) -> dict[str, int]:
    """Bytes of the buffers that such a step has beside the others."""
    pairs = rows * top_k
    sizes = {LEFT_IDS: pairs * 4, f"{ROUTED}.pairs": pairs * 4, CONTRIBUTIONS: pairs * row_stride(spec.hidden) * 4}
    if not next_gate:
        return sizes
    scores = max(layer.feed_forward.experts + layer.feed_forward.shared_gate for layer in spec.layers)
    early = {f"{NEXT}router_logits": rows * scores * 4, f"{NEXT}{IDS}": pairs * 4, f"{NEXT}{WEIGHTS}": pairs * 4}
    return sizes | early | {f"{NEXT}shared.weights": rows * 4}


def _place(group: Op, moe: int) -> Iterator[Op]:
    yield Op("host", "place", {"call": Callback("place", moe)}, (1, "thread"), group.layer)
    changes = {"ids": Buffer(LEFT_IDS), "weights": None, "pairs": Buffer(f"{ROUTED}.pairs")}
    yield replace(group, part="place", arguments=group.arguments | changes)


def _down_and_join(down: Op, moe: int, top_k: int) -> Iterator[Op]:
    """A shared expert is added last, as in the step without a device."""
    routed = {name: value for name, value in down.arguments.items() if name != "shared"}
    stride = routed["output_stride"]
    by_pair = {"routing": RoutingTable(ROUTED, "pairs"), "output": Buffer(CONTRIBUTIONS)}
    yield replace(down, arguments=routed | by_pair)
    yield Op("host", "join", {"call": Callback("join", moe)}, (1, "thread"), down.layer)
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
    yield Op("combine", "join", sums, (0, "rows"), down.layer)
    if "shared" in down.arguments:
        output = {"output": down.arguments["output"], "output_stride": stride}
        yield replace(down, arguments=down.arguments["shared"].arguments | output)


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
    layer = next(op.layer for op in placed if _is_routed(op))
    return [_on_slots(op, slots) for op in placed if op.layer == layer and (_is_routed(op) or is_activation(op))]


def _is_routed(op: Op) -> bool:
    routing = op.arguments.get("routing")
    return isinstance(routing, RoutingTable) and routing.name == ROUTED


def is_activation(op: Op) -> bool:
    """Whether it quantises what experts other than the shared one made."""
    return op.kind == "quantise" and str(op.arguments["input"].name).startswith("activation.")


def _on_slots(op: Op, slots: int) -> Op:
    shared = ("shared", "shared_output", "shared_output_stride")
    arguments = {name: _slot_piece(value) for name, value in op.arguments.items() if name not in shared}
    if op.kind == "group":
        arguments |= {"experts": slots}
    return replace(op, arguments=arguments, layer=None)


def _slot_piece(value: Any) -> Any:
    return Weight(value.name.rsplit(".", 1)[-1], value.offset) if isinstance(value, Weight) else value
