"""The plan of a step with a device: its ops, its buffers, its slots, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_plan import plan_of, spec_of
from test_program import SPECS, TEXTS, buffers_of, kinds

from hybrid.config import CacheConfig, DeviceConfig
from hybrid.errors import ConfigError
from hybrid.ops import Buffer, Callback, RoutingTable, Weight
from hybrid.plan.expert_shape import expert_shape
from hybrid.plan.passes.place_experts import CONTRIBUTIONS, LEFT_IDS, device_ops
from hybrid.plan.plan import Plan
from hybrid.plan.text import plan_text

# Families with experts, without those whose experts have bounds, which no cache knows of.
MOE = [
    name
    for name, spec in SPECS.items()
    if spec.moe_layers and not any(spec.layers[layer].feed_forward.bound for layer in spec.moe_layers)
]


def cached(name: str = "qwen3_moe", memory: int = 32 << 30, device: DeviceConfig | None = None, **choices) -> Plan:
    """A plan with a cache; choices: of the cache, and `weight_format`."""
    more = {"weight_format": choices.pop("weight_format", "bf16"), "simulated": device or DeviceConfig()}
    return plan_of(SPECS[name], memory, device="simulated", cache=CacheConfig(**choices), **more)


def test_a_gpu_is_refused_experts_of_which_it_has_no_kernels() -> None:
    with pytest.raises(ConfigError, match="a GPU cannot compute experts in q4_k, but in bf16, int8, int4, fp8, mxfp4"):
        plan_of(
            SPECS["qwen3_moe"], 32 << 30, device="cuda", cache=CacheConfig(), weight_format="q4_k", step_on="threads"
        )
    assert cached(weight_format="bf16,experts=q4_k").cache, "the simulated device computes them on the CPU"


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("nemotron_h", "experts with relu_squared"),
        ("gemma4_text", "experts with gelu_tanh"),
        ("afmoe", "experts whose sum is"),
    ],
)
def test_a_gpu_is_refused_experts_of_another_kind_than_its_kernels(family: str, message: str) -> None:
    """Which threads beside it would not notice."""
    with pytest.raises(ConfigError, match=f"a GPU cannot compute {message}"):
        plan_of(SPECS[family], 32 << 30, device="cuda", cache=CacheConfig(), weight_format="bf16", step_on="threads")
    assert cached(family).cache


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("prefetch", ["none", "next-gate"])
def test_there_is_every_buffer_that_an_op_uses_and_no_other(name, prefetch) -> None:
    """In every mix."""
    early = {"next_shared.weights", "next_router_logits", "next_expert_ids", "next_expert_weights"}
    for text in TEXTS:
        plan = cached(name, weight_format=text, prefetch=prefetch)
        used = {buffer for op in (*plan.ops, *plan.placed_ops) for buffer in buffers_of(op)}
        used |= {"routing.pairs"}  # an argument of its own, where others are part of a routing
        unused = set(plan.buffers) - used
        assert used <= set(plan.buffers) and unused <= (set() if prefetch == "none" else early), text


def test_a_layer_asks_twice_and_its_sums_come_last() -> None:
    plan = cached(weight_format="int8")
    assert kinds(plan.placed_ops, 0)[-9:] == [
        "router", "topk", "host", "group", "gate_up", "quantise", "down", "host", "combine",
    ]  # fmt: skip
    assert kinds(plan.placed_ops, 1) == kinds(plan.ops, 1), "a dense layer stays as it is"
    calls = [op.arguments["call"] for op in plan.placed_ops if op.kind == "host"]
    assert calls == [Callback(kind, layer) for layer in (0, 1) for kind in ("place", "join")]
    down = next(op.arguments for op in plan.placed_ops if op.kind == "down")
    assert (down["routing"], down["output"]) == (RoutingTable("routing", "pairs"), Buffer(CONTRIBUTIONS))
    group = next(op.arguments for op in plan.placed_ops if op.kind == "group" and op.layer == 0)
    assert (group["ids"], group["weights"]) == (Buffer(LEFT_IDS), None)


def test_a_shared_expert_is_added_after_the_routed_ones() -> None:
    plan = cached("qwen2_moe")
    last = [op for op in plan.placed_ops if op.layer == 0][-2:]
    assert [op.kind for op in last] == ["combine", "down"]
    assert last[1].arguments["experts"].name == "layers.0.ffn.shared"
    assert last[1].arguments["output"] == Buffer("residual")


def test_the_router_of_the_next_layer_is_asked_early() -> None:
    plan = cached("mixtral", prefetch="next-gate")
    routers = [op for op in plan.placed_ops if op.kind == "router"]
    assert [(op.layer, op.arguments["weight"].name) for op in routers] == [
        (0, "layers.0.ffn.router"), (0, "layers.1.ffn.router"), (1, "layers.1.ffn.router"),
    ]  # fmt: skip
    assert routers[1].arguments["logits"] == Buffer("next_router_logits")


def test_a_device_runs_the_routed_experts_of_one_layer_over_slots() -> None:
    ops = device_ops(cached("gpt_oss", weight_format="int8").placed_ops, 9)
    assert [op.kind for op in ops] == ["group", "gate_up", "quantise", "down"]
    group, gate_up, _, down = (op.arguments for op in ops)
    assert group["experts"] == 9 and gate_up["experts"] == Weight("experts") and down["bias"] == Weight("down_bias")


def test_the_slots_are_counted() -> None:
    """By hand: gate and up [40, 96] are 48 x 128 and down [96, 40] is 96 x 64 padded bf16 values."""
    plan, without = cached(nblocks=2, nways=3, stream="off"), plan_of()
    assert plan.cache.slot_bytes == 2 * (2 * 48 * 128 + 96 * 64) and plan.cache.nbytes == 6 * plan.cache.slot_bytes
    more = plan.arena_bytes - without.arena_bytes
    assert plan.fixed_bytes == without.fixed_bytes + more + plan.cache.nbytes
    assert "2 indexes of 3 slots" in plan_text(plan) and plan.to_dict()["cache"]["slots"] == 6
    assert without.cache is None and without.placed_ops == () and without.to_dict()["cache"] is None


def test_a_stream_has_two_slots_of_its_own() -> None:
    still, streaming = (cached(nblocks=2, nways=3, stream=mode).cache for mode in ("off", "on"))
    assert streaming.nbytes == still.nbytes + 2 * still.slot_bytes and streaming.geometry == still.geometry
    assert "2 slots more for streams" in str(streaming) and "streams" not in str(still)
    assert [cache.to_dict()["staging"] for cache in (still, streaming)] == [0, 2]
    with pytest.raises(ConfigError, match="are 8 slots of .*; 7 fit the device .*, beside the 2 of --cache-stream on"):
        cached(nblocks=2, nways=4, stream="on", device=DeviceConfig(memory_gb=9.5 * still.slot_bytes / 1e9))


def test_biases_are_part_of_a_slot() -> None:
    spec = SPECS["gpt_oss"]
    tensors = {tensor.name: tensor for tensor in spec.store_tensors(plan_of(spec).formats)}
    shape = expert_shape(spec, tensors)
    assert [name for name, _ in shape.pieces] == ["experts", "gate_up_bias", "down_bias"]
    assert shape.nbytes == sum(tensors[f"layers.0.ffn.{name}"].nbytes // 6 for name, _ in shape.pieces)


def test_auto_takes_what_fits() -> None:
    slot = cached().cache.slot_bytes
    assert cached().cache.geometry.slots == 20, "two MoE layers of ten experts"
    few = cached(device=DeviceConfig(memory_gb=9.5 * slot / 1e9), nblocks="auto", mapping="hash")
    assert few.cache.geometry.slots <= 7 and few.cache.geometry.mapping == "hash"


def test_too_many_slots_are_refused_with_how_many_fit() -> None:
    slot = cached().cache.slot_bytes
    with pytest.raises(ConfigError, match=r"2 x --cache-nways 4 are 8 slots of .*; 7 fit the device"):
        cached(nblocks=2, nways=4, stream="off", device=DeviceConfig(memory_gb=7.5 * slot / 1e9))
    with pytest.raises(ConfigError, match="6 fit the device"):  # memory of the host
        needed = plan_of().fixed_bytes + cached().arena_bytes - plan_of().arena_bytes
        tokens = cached(nblocks=1, nways=1).max_seq_len * plan_of().kv.token_bytes
        cached(memory=needed + tokens + 6 * slot + 5, nblocks=2, nways=4, stream="off")
    with pytest.raises(ConfigError, match="30 slots, the model has 20 experts"):
        cached(nblocks=2, nways=15)


def test_what_cannot_have_a_cache_says_so() -> None:
    with pytest.raises(ConfigError, match="no experts to cache"):
        plan_of(spec_of("llama"), device="simulated")
    assert "below the 3 experts" in (cached(nblocks=2, nways=2).cache.warning or "")
    assert cached(nblocks=2, nways=3).cache.warning is None
    spec = SPECS["mixtral"]
    first, second = spec.layers
    uneven = replace(spec, layers=(first, replace(second, feed_forward=replace(second.feed_forward, intermediate=8))))
    with pytest.raises(ConfigError, match="several sizes"):
        plan_of(uneven, device="simulated")


def test_figures_of_a_device_that_cannot_be_are_named_as_they_are_given() -> None:
    for name, said in (("latency_us", "--device-latency-us -1"), ("jitter_us", "DeviceConfig.jitter_us -1")):
        with pytest.raises(ConfigError, match=f"^{said} is out of range; give a number from 0 to 1e.09$"):
            cached(device=DeviceConfig(**{name: -1}))
    with pytest.raises(ConfigError, match="^--device-tflops 0 is out of range; give a number above 0$"):
        cached(device=DeviceConfig(tflops=0))
    with pytest.raises(ConfigError, match="--cache-stream 'some' is unknown; allowed: auto, on, off"):
        cached(stream="some")
