"""The op list of a step with a device: what is left to the threads, in which order, and nothing twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from configs import ON_DEVICE
from test_program import SPECS, TEXTS, mix_of

from hybrid.formats.mix import FormatMix
from hybrid.models.layers.base import Extents
from hybrid.models.layers.feed_forward import EXPERT_SUM
from hybrid.models.layers.older_tokens import ENDS, NEW_KV, STATES
from hybrid.models.spec import ModelSpec
from hybrid.ops import Buffer, Op, RoutingTable, Weight
from hybrid.plan.passes.gpu_step import CALLS, device_step_buffers, device_step_ops
from hybrid.plan.passes.place_experts import observe_routes, place_experts
from hybrid.plan.passes.split_nodes import split_over_nodes
from hybrid.plan.program import build_ops


def ops_of(spec: ModelSpec, mix: FormatMix, placed: bool) -> list[Op]:
    ops = build_ops(spec, mix)
    return device_step_ops(spec, place_experts(ops) if placed else ops)


def calls(ops: list[Op]) -> list[tuple[str, int]]:
    return [(op.arguments["call"].kind, op.arguments["call"].layer) for op in ops if op.kind == "host"]


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("name", [*ON_DEVICE, "with biases", "ungated shared", "one width"])
def test_every_layer_crosses_to_the_device_and_back_in_turn(name, placed) -> None:
    """In every mix."""
    spec = SPECS[name]
    if placed and not spec.moe_layers:
        pytest.skip("no experts to place")
    wanted, moe = [], 0
    for index, layer in enumerate(spec.layers):
        wanted += [("attend", index), ("route", index)]
        if placed and layer.feed_forward.is_moe:
            wanted += [("place", moe), ("join", moe)]
            moe += 1
    for text in TEXTS:
        ops = ops_of(spec, mix_of(text), placed)
        assert calls(ops) == [("start", 0), *wanted, ("finish", 0)], text


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "gpt_oss", "with biases", "ungated shared"])
def test_the_threads_keep_older_tokens_the_home_and_routed_experts(name, text, placed) -> None:
    spec = SPECS[name]
    whole = ops_of(spec, mix_of(text), placed)
    for index, layer in enumerate(spec.layers):
        ops = [op for op in whole if op.layer == index and op.kind != "host"]
        kinds = [op.kind for op in ops if op.kind != "quantise"]
        experts = ["group", "gate_up", "down"] + ["combine"] * placed
        assert kinds == ["attention", "qkv", *(experts if layer.feed_forward.is_moe else [])]
        assert not [op for op in ops if any(key.startswith("shared") for key in op.arguments)]
        weights = {value.name for op in ops for value in op.arguments.values() if isinstance(value, Weight)}
        assert weights <= {f"layers.{index}.ffn.{piece}" for piece in ("experts", "gate_up_bias", "down_bias")}


@pytest.mark.parametrize("placed", [False, True])
def test_sums_go_to_a_buffer_of_their_own(placed) -> None:
    ops = ops_of(SPECS["qwen2_moe"], mix_of("int8"), placed)
    used = {value.name for op in ops for value in op.arguments.values() if isinstance(value, Buffer)}
    assert {NEW_KV, ENDS, STATES, EXPERT_SUM} <= used and "residual" not in used
    buffers = device_step_buffers(SPECS["qwen2_moe"], mix_of("int8"), Extents(8, 2, 300))
    assert set(buffers) == {NEW_KV, ENDS, STATES, EXPERT_SUM}
    assert not [op for op in ops if isinstance(op.arguments.get("routing"), RoutingTable) and op.layer is None]


def test_observers_are_told_after_the_router() -> None:
    spec, mix = SPECS["qwen3_moe"], mix_of("bf16")
    ops = device_step_ops(spec, observe_routes(build_ops(spec, mix)))
    kinds = [kind for kind, _ in calls(ops)]
    assert kinds == ["start", "attend", "route", "observe", "attend", "route", "attend", "route", "observe", "finish"]
    assert {kind for kind in kinds if kind != "observe"} == set(CALLS)


@pytest.mark.parametrize("half", ["mixer", "feed_forward", ""])
def test_an_op_that_nobody_told_of_is_refused(half) -> None:
    """To leave it out would be to compute something else without a word."""
    spec = SPECS["qwen3_moe"]
    ops = build_ops(spec, mix_of("bf16"))
    stray = replace(ops[0], kind="hadamard", layer=0 if half else None, half=half)
    for steps in (place_experts, lambda ops: split_over_nodes(ops, {}, {}, 2), lambda ops: device_step_ops(spec, ops)):
        with pytest.raises(ValueError, match="hadamard are unknown; known: embed"):
            steps([*ops, stray])
    known = replace(stray, kind="combine" if half != "feed_forward" else "qkv")
    with pytest.raises(ValueError, match="a device does not know what becomes of"):
        device_step_ops(spec, [*ops, known])
