"""A plan is sums: nothing is read, every part is counted, and what does not fit or cannot run is said with numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
from checkpoints import CONFIGS, write_checkpoint

from hybrid.config import EngineConfig
from hybrid.engine import Engine, plan_model
from hybrid.errors import CapacityError, ConfigError
from hybrid.hardware import HardwareSpec
from hybrid.models import model_spec
from hybrid.models.spec import MlaSpec, ModelSpec
from hybrid.plan import RUNTIME_BYTES, Plan, make_plan
from hybrid.weights.pack import pack
from hybrid.weights.store import Store

MACHINE = HardwareSpec(
    cpu_model="test",
    cpus=(0, 2, 4, 6),
    default_threads=4,
    memory_total=64 << 30,
    memory_available=32 << 30,
    isa="avx2",
    isas=("avx2", "portable"),
)


def spec_of(family: str = "qwen3_moe", **changes: Any) -> ModelSpec:
    return model_spec({**CONFIGS[family], **changes})


def plan_of(spec: ModelSpec | None = None, memory: int = MACHINE.memory_available, **choices: Any) -> Plan:
    return make_plan(spec or spec_of(), replace(MACHINE, memory_available=memory), EngineConfig(**choices))


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_those_of_the_packed_store(tmp_path, family) -> None:
    from hybrid.weights.checkpoint import Checkpoint

    pack(Checkpoint.open(write_checkpoint(tmp_path / "hf", family)), tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        assert sum(plan_of(spec_of(family)).weight_bytes.values()) == store.nbytes


@pytest.mark.parametrize("family", CONFIGS)
def test_the_arena_is_the_sum_of_its_parts(family) -> None:
    plan = plan_of(spec_of(family))
    end = 0
    for offset, size in plan.buffers.values():
        assert offset % 64 == 0 and end <= offset < end + 64
        end = offset + size
    assert end <= plan.arena_bytes < end + 64
    parts = sum(plan.weight_bytes.values()) + plan.arena_bytes + 4 * plan.scratch_bytes + plan.logits_bytes
    assert plan.fixed_bytes == parts + RUNTIME_BYTES


def test_keys_and_values_lie_one_after_the_other() -> None:
    """Every (layer, head) has its own keys, then values, and a slot ends where the last one does."""
    spec = spec_of(head_dim=40)
    kv = plan_of(spec, max_seq_len=100).kv
    assert kv.tokens == 256
    end = 0
    for layer, start in enumerate(kv.layer_offsets):
        assert start == end
        assert kv.value_offsets[layer] == 256 * 64 * 2  # keys padded to 64
        assert kv.head_strides[layer] == 256 * (64 + 48) * 2  # values to 48
        end = start + 2 * kv.head_strides[layer]
    assert kv.slot_stride == end
    assert kv.token_bytes * 256 == end


def test_a_plan_reads_no_weights(tmp_path) -> None:
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    (path / "model.safetensors").unlink()
    plan = plan_model(EngineConfig(model_path=path, cache_dir=tmp_path / "cache"))
    assert plan.model_type == "qwen3_moe" and not (tmp_path / "cache").exists()


def test_a_model_that_does_not_fit_is_planned_but_refused_with_numbers() -> None:
    spec = spec_of()
    needed = plan_of(spec, max_seq_len=128)
    total = needed.fixed_bytes + 128 * needed.kv.token_bytes
    assert plan_of(spec, total, max_seq_len=128).problem is None
    plan = plan_of(spec, total - 1, max_seq_len=128)
    assert plan.problem is not None and plan.problem in str(plan)
    assert f"{total / 1e9:.2f} GB" in plan.problem and "are free" in plan.problem and "\n" not in plan.problem
    with pytest.raises(CapacityError, match="does not fit in memory"):
        plan.require_fit()
    assert plan.to_dict()["problem"] == plan.problem


def test_the_engine_refuses_what_does_not_fit_before_packing(tmp_path, monkeypatch) -> None:
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    monkeypatch.setattr("hybrid.engine.probe", lambda isa: replace(MACHINE, memory_available=1 << 20))
    with pytest.raises(CapacityError, match=r"does not fit.* 1\.05 MB are free"):
        Engine.open(EngineConfig(model_path=path, cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_without_a_wish_sequences_are_as_long_as_memory_allows() -> None:
    spec = spec_of(max_position_embeddings=100_000)
    assert plan_of(spec).max_seq_len == 32768
    assert plan_of(spec_of()).max_seq_len == 256
    fixed = plan_of(spec)
    memory = fixed.fixed_bytes + 5000 * fixed.kv.token_bytes
    plan = plan_of(spec, memory)
    assert plan.problem is None and 4000 < plan.max_seq_len <= 6000
    assert plan_of(spec, memory, max_seq_len=20_000).problem is not None
    assert plan_of(spec, fixed.fixed_bytes // 2).problem is not None


def test_the_budget_counts_all_slots_and_no_more_than_memory() -> None:
    plan = plan_of(max_seq_len=200, max_batch=3)
    assert plan.kv_token_budget == 600
    tight = plan_of(memory=plan.fixed_bytes + 300 * plan.kv.token_bytes, max_seq_len=200, max_batch=3)
    assert tight.kv_token_budget == 300 and tight.problem is None


def test_a_sequence_longer_than_the_model_allows_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="--max-seq-len 257 is above the model's 256 positions"):
        plan_of(max_seq_len=257)
    assert plan_of(max_seq_len=256).max_seq_len == 256


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"threads": 0}, "--threads 0"),
        ({"max_batch": 0}, "--max-batch 0"),
        ({"chunk_size": 4, "max_batch": 8}, "--chunk-size 4 is smaller than --max-batch 8"),
        ({"weight_format": "int3"}, "int3"),
    ],
)
def test_values_out_of_range_are_refused(choices, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(**choices)


def test_devices_of_later_versions_are_refused(tmp_path) -> None:
    for device in ("cuda", "simulated"):
        with pytest.raises(ConfigError, match=f"--device {device} .*auto or cpu"):
            plan_model(EngineConfig(device=device))


@pytest.mark.parametrize(("threads", "cpus"), [(None, (0, 2, 4, 6)), (1, (0,)), (3, (0, 2, 4)), (5, ())])
def test_threads_are_pinned_where_there_are_enough_processors(threads, cpus) -> None:
    plan = plan_of(threads=threads)
    assert (plan.threads, plan.cpus) == (threads or 4, cpus)


ATTENTION: dict[str, Any] = {
    "attention of kind 'linear'": {"kind": "linear"},
    "attention of kind 'mla'": {"kind": "mla", "mla": MlaSpec(None, 8, 8, 8)},
    "values of another size than keys": {"v_head_dim": 8},
    "norm 'whole' on queries and keys": {"qk_norm": "whole"},
    "attention sinks": {"sinks": True},
    "gated attention": {"output_gate": True},
}
FEED_FORWARD: dict[str, Any] = {
    "activation 'gelu'": {"activation": "gelu"},
    "biases in the feed-forward": {"bias": True},
    "shared experts": {"shared_intermediate": 8},
}
ROUTER: dict[str, Any] = {
    "router of kind 'sigmoid'": {"kind": "sigmoid"},
    "router of kind 'sparsemixer'": {"kind": "sparsemixer"},
    "router of kind 'softmax'": {"groups": 2},
}
MODEL: dict[str, Any] = {"a bias on the output head": {"head_bias": True}}
NORM: dict[str, Any] = {"norm of kind 'layer'": {"kind": "layer"}, "norm of kind 'rms'": {"zero_centred": True}}


def changed(what: str) -> ModelSpec:
    """The model with one part that no kernel implements, in its last layer."""
    spec = spec_of()
    *first, last = spec.layers
    ffn = last.feed_forward
    if what in ATTENTION:
        last = replace(last, attention=replace(last.attention, **ATTENTION[what]))
    elif what in FEED_FORWARD:
        last = replace(last, feed_forward=replace(ffn, **FEED_FORWARD[what]))
    elif what in ROUTER:
        assert ffn.router is not None
        last = replace(last, feed_forward=replace(ffn, router=replace(ffn.router, **ROUTER[what])))
    norm = replace(spec.norm, **NORM.get(what, {}))
    return replace(spec, layers=(*first, last), norm=norm, **MODEL.get(what, {}))


@pytest.mark.parametrize("what", [*ATTENTION, *FEED_FORWARD, *ROUTER, *MODEL, *NORM])
def test_what_no_kernel_implements_is_refused_by_name(what) -> None:
    with pytest.raises(ConfigError) as error:
        plan_of(changed(what))
    assert str(error.value) == f"model_type 'qwen3_moe' uses {what}, which this version cannot run"


def test_the_printed_plan_names_every_part() -> None:
    plan = plan_of()
    text = str(plan)
    for part in (*plan.weight_bytes, "arena", "scratch", "logits", "KV", "memory free", "avx2", "4 threads", "fits"):
        assert part in text
    for kind in {op.kind for op in plan.ops if op.layer in (None, 0)}:
        assert kind in text
    assert json.loads(json.dumps(plan.to_dict()))["ops"] == len(plan.ops)


def test_a_plan_is_the_same_for_the_same_input() -> None:
    assert plan_of() == plan_of()
    assert dataclasses.asdict(plan_of(chunk_size=64)) != dataclasses.asdict(plan_of())
