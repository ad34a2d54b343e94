"""A step whose residual stream lives on a device: the threads keep experts, the home of the KV and its older tokens.

The op list of a step without such a device is turned into one in which `hybrid.gpu.step` is called back: to start,
twice a layer, and to finish. It does what is left out here: embedding, norms, projections, rope, attention over the
tokens that it mirrors, dense and shared experts, the router and the head. In each layer:

    attend       callback: residual, norm, projections, rope; attention over mirrored tokens begins
    attention    of older tokens, if any: states, which the device joins with its own
    route        callback: joined attention, output projection, norm, router; rows, ids and weights come to the host
    qkv          writes the keys and values of the step's rows to their home
    experts      as in the step that this one is made of, summed in a buffer that `attend` of the next layer takes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from hybrid.models.spec import LayerSpec, ModelSpec
from hybrid.ops import Buffer, Callback, Op, RoutingTable
from hybrid.plan.passes.place_experts import ROUTED, TAKE, is_activation
from hybrid.plan.program import STATE_EXTRA, row_stride, value_dim

NEW_KV = "device.kv"  # keys, then values of a layer for the rows of a step: float32 [rows, 2 * kv_heads * head_dim]
ENDS = "device.ends"  # int32 [rows]: tokens from there on are mirrored by the device
STATES = "device.states"  # softmax states of older tokens: float32 [rows, heads, value_dim + 16]
EXPERT_SUM = "device.sum"  # what the threads make of the experts of a layer: float32 [rows, row_stride(hidden)]
CALLS = ("start", "attend", "route", "finish")  # kinds of callbacks


def device_step_ops(ops: Iterable[Op]) -> list[Op]:
    """ops: of a step on the threads alone, or of one whose experts are placed."""
    start, finish = (
        Op("host", part, {"call": Callback(kind, 0)}, (1, "thread"))
        for kind, part in (("start", "other"), ("finish", "head"))
    )
    return [start, *_layers(list(ops)), finish]


def device_step_buffers(spec: ModelSpec, rows: int) -> dict[str, int]:
    """Bytes of the buffers that such a step has beside the others."""
    layers = spec.layers
    return {
        NEW_KV: rows * max(map(kv_width, layers)) * 4,
        ENDS: rows * 4,
        STATES: rows * max(map(state_floats, layers)) * 4,
        EXPERT_SUM: rows * row_stride(spec.hidden) * 4,
    }


def kv_width(layer: LayerSpec) -> int:
    """Floats of a row's keys and values."""
    return 2 * layer.attention.kv_heads * layer.attention.head_dim


def state_floats(layer: LayerSpec) -> int:
    """Floats of a row's softmax states."""
    return layer.attention.heads * (value_dim(layer) + STATE_EXTRA)


def _layers(ops: list[Op]) -> Iterator[Op]:
    routed = {op.layer for op in ops if op.kind == "group" and _is_routed(op)}
    qkv = {op.layer: op for op in ops if op.kind == "qkv"}
    for op in ops:
        if op.kind == "attention":
            yield _call("attend", op)
            yield _older_tokens(op)
            yield _call("route", op)
            yield _store(qkv[op.layer])
        elif _is_told(op) or op.kind == "combine" or _is_routed(op) or (is_activation(op) and op.layer in routed):
            yield _expert_op(op)


def _is_told(op: Op) -> bool:
    """Whether it is a callback that the threads still need: `route` has the experts of a trace already."""
    return op.kind == "host" and op.arguments["call"].kind != TAKE


def _is_routed(op: Op) -> bool:
    return op.arguments.get("routing") in (RoutingTable(ROUTED), RoutingTable(ROUTED, "pairs"))


def _call(kind: str, at: Op) -> Op:
    assert at.layer is not None
    part = "moe" if kind == "route" else "attention"
    return Op("host", part, {"call": Callback(kind, at.layer)}, (1, "thread"), at.layer)


def _older_tokens(attention: Op) -> Op:
    """Sinks are the device's: they share in the whole softmax, once."""
    changes = {"output": None, "sinks": None, "ends": Buffer(ENDS), "partials": Buffer(STATES)}
    return replace(attention, arguments=attention.arguments | changes)


def _store(qkv: Op) -> Op:
    """Keys come normed and turned."""
    heads, dim = qkv.arguments["kv_heads"], qkv.arguments["head_dim"]
    nothing: dict[str, Any] = {"heads": 0, "q": None, "rope": None, "rope_dim": 0, "q_norm": None, "k_norm": None}
    rows = {"qkv": Buffer(NEW_KV), "qkv_stride": 2 * heads * dim}
    return replace(qkv, arguments=qkv.arguments | nothing | rows, split=(2 * heads, "heads a row"))


def _expert_op(op: Op) -> Op:
    """Without the shared expert, and what went to the residual stream goes to the sum."""
    arguments = {name: value for name, value in op.arguments.items() if not name.startswith("shared")}
    if arguments.get("output") == Buffer("residual"):
        arguments["output"] = Buffer(EXPERT_SUM)
    return replace(op, arguments=arguments)
