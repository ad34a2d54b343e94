"""A plan is sums: nothing is read, every part is counted, and what does not fit or cannot run is said with numbers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest
from checkpoints import write_checkpoint
from configs import CONFIGS
from kv_pages import KvPages

from hybrid.config import KV_FORMATS, WEIGHT_FORMATS, EngineConfig
from hybrid.engine.engine import Engine
from hybrid.errors import CapacityError, ConfigError
from hybrid.formats import FORMATS
from hybrid.formats.mix import MIXES, FormatMix, parse_mix
from hybrid.machine import gpu as usable
from hybrid.machine.hardware import HardwareSpec
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.plan.kv_layout import lay_out_kv
from hybrid.plan.plan import RUNTIME_BYTES, Plan, make_plan
from hybrid.plan.resolve import plan_model
from hybrid.plan.text import plan_text
from hybrid.weights.pack import cached_store

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
    config = EngineConfig(**choices)
    mix = parse_mix(config.weight_format, FormatMix.uniform("bf16"))
    return make_plan(spec or spec_of(), replace(MACHINE, memory_available=memory), config, mix)


MIXED = "int4,head=int8,dense=fp8,attention=bf16"
PACKED = [*((family, MIXED) for family in CONFIGS), *(("qwen2_moe", name) for name in MIXES), ("deepseek_v3", "nvfp4")]


@pytest.mark.parametrize(("family", "text"), PACKED)
def test_weights_are_those_of_the_packed_store(tmp_path, family, text) -> None:
    source = write_checkpoint(tmp_path / "hf", family)
    plan = plan_of(spec_of(family), weight_format=text)
    with cached_store(source, tmp_path / "cache", text) as store:
        assert sum(plan.weight_bytes.values()) == store.nbytes
        assert plan.formats == store.mix


def test_the_bytes_of_a_part_are_those_of_its_format() -> None:
    """By hand: int4 takes half a byte and a sixteenth for its scale, of 16 x 64 padded values; fp8 a byte."""
    parts = plan_of(weight_format="int4,dense=fp8,head=int8").weight_bytes
    expert = (2 * 48 * 128 + 96 * 64) * (4 + 0.5) / 8  # gate and up [40, 96], down [96, 40]
    assert parts["experts"] == 2 * 10 * expert
    assert parts["dense"] == (2 * 5 + 6) * (64 + 128 * 16)  # blocks of gate, up [72, 96] and down [96, 72]
    assert parts["head"] == 9 * (64 + 128 * 16)
    assert parts["embedding"] == 144 * 128 * 2
    assert parts["attention"] == 3 * (240 * 128 + 96 * 192) * (4 + 0.5) / 8


@pytest.mark.parametrize("family", CONFIGS)
def test_the_arena_is_the_sum_of_its_parts(family) -> None:
    plan = plan_of(spec_of(family))
    end = 0
    for offset, size in plan.buffers.values():
        assert offset % 64 == 0 and end <= offset < end + 64
        end = offset + size
    assert end <= plan.arena_bytes < end + 64
    parts = sum(plan.weight_bytes.values()) + plan.arena_bytes + 4 * plan.scratch_bytes + plan.logits_bytes
    assert plan.fixed_bytes == parts + RUNTIME_BYTES + plan.sequences * plan.kv.fixed_bytes


@pytest.mark.parametrize(("format", "size", "scale"), [("bf16", 2, 0), ("int8", 1, 4), ("fp8", 1, 4)])
def test_keys_and_values_lie_one_after_the_other(format, size, scale) -> None:
    """Every (layer, head) has its own keys, values and scales of both, and a slot ends where the last one does."""
    kv = plan_of(spec_of(head_dim=40), max_seq_len=100, kv_format=format).kv
    assert (kv.tokens, kv.format) == (256, format)
    end = 0
    for start, layer in zip(kv.offsets, kv.layers, strict=True):
        assert start == end
        values, scales = 256 * 64 * size, 256 * (64 + 48) * size  # keys padded to 64, values to 48
        stride = scales + 2 * 256 * scale
        assert layer.fields["value_offset"] == values
        assert layer.fields["key_scales_offset"] == (scales if scale else 0)
        assert layer.fields["value_scales_offset"] == (scales + 256 * scale if scale else 0)
        assert layer.fields["head_stride"] == stride and layer.nbytes == 2 * stride
        parts = [(0, values), (values, scales - values)]
        if scale:
            parts += [(scales, 256 * scale), (scales + 256 * scale, 256 * scale)]
        assert layer.runs == tuple((head + start, size) for head in (0, stride) for start, size in parts)
        end = start + 2 * stride
    assert kv.sequence_stride == end
    assert kv.token_bytes * 256 == end


@pytest.mark.parametrize("format", KV_FORMATS)
def test_pages_of_the_kernel_tests_lie_as_planned(format) -> None:
    pages = KvPages(slots=2, heads=2, head_dim=24, tokens=300, format=format)
    kv = lay_out_kv(spec_of(), 300, format)
    fields = kv.layers[0].fields
    found = (pages.tokens, pages.value_offset, pages.nbytes)
    assert found == (kv.tokens, fields["value_offset"], 4 * fields["head_stride"])
    assert format == "bf16" or pages.scales_offset == fields["key_scales_offset"]


@pytest.mark.parametrize(
    ("isa", "rows", "choices", "expected"),
    [  # heads of 24, values padded to 32: 96 rows of 256 scores and weights and two states, then keys or values as bf16
        ("avx2", 100, {}, 96 * (256 * 6 + (32 + 16) * 8)),
        ("avx2", 100, {"kv_format": "int8"}, 96 * (256 * 6 + (32 + 16) * 8) + 2 * 16 * 256 * 2),
        ("avx512", 100, {"kv_format": "fp8"}, 96 * (256 * 6 + (32 + 16) * 8) + 2 * 16 * 256 * 2),
        ("avx512_bf16", 100, {"kv_format": "fp8"}, 96 * (256 * 6 + (32 + 16) * 8) + 4 * 16 * 256 * 2),
        # sums of 2 or 4 blocks, panels of 256 inputs for formats that are opened
        ("avx2", 4000, {}, 4000 * 2 * 64),
        ("avx512_bf16", 4000, {}, 4000 * 4 * 64),
        ("avx512_bf16", 4000, {"weight_format": "fp8"}, 4000 * 4 * 64 + 4 * 8192),
        # tiles have more where rows are few; sums of 4 blocks of all rows are more than those of 16 of 512 and copies
        ("amx", 500, {}, 512 * 16 * 64 + 16 * (32 * 512 + 64)),
        ("amx", 4001, {}, 4001 * 4 * 64),
        ("amx", 4001, {"weight_format": "int4"}, 4001 * 4 * 64 + 4 * 8192),
    ],
)
def test_scratch_is_what_the_op_needs_that_needs_most(isa, rows, choices, expected) -> None:
    config = EngineConfig(chunk_size=rows, **choices)
    mix = parse_mix(config.weight_format, FormatMix.uniform("bf16"))
    plan = make_plan(spec_of(), replace(MACHINE, isa=isa), config, mix)
    assert plan.scratch_bytes == -(-expected // 4096) * 4096


def test_the_ops_of_memory_nodes_have_scratch_too() -> None:
    """A node multiplies all rows with its part of the inputs."""
    machine = replace(MACHINE, isa="amx")
    whole, split = (
        make_plan(spec_of(), machine, EngineConfig(chunk_size=4000, numa=numa), FormatMix.uniform("int4"))
        for numa in ("off", "2")
    )
    assert split.nodes == 2 and whole.scratch_bytes == split.scratch_bytes > 4000 * 4 * 64


@pytest.mark.parametrize(("isa", "free"), [("avx2", True), ("avx512_bf16", True), ("amx", False)])
def test_a_batch_is_invariant_where_that_is_free_or_wanted(isa, free) -> None:
    def invariant(choice: bool | None) -> bool:
        mix = FormatMix.uniform("bf16")
        plan = make_plan(spec_of(), replace(MACHINE, isa=isa), EngineConfig(batch_invariant=choice), mix)
        assert ("depend on what else runs" in plan_text(plan)) != plan.batch_invariant
        return plan.batch_invariant

    assert [invariant(choice) for choice in (None, True, False)] == [free, True, False]


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
    assert plan.problem is not None and plan.problem in plan_text(plan)
    assert f"{total / 1e9:.2f} GB" in plan.problem and "are free" in plan.problem and "\n" not in plan.problem
    with pytest.raises(CapacityError, match="does not fit in memory"):
        plan.require_fit()
    assert plan.to_dict()["problem"] == plan.problem


def test_the_engine_refuses_what_does_not_fit_before_packing(tmp_path, monkeypatch) -> None:
    path = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    monkeypatch.setattr("hybrid.plan.resolve.probe", lambda isa: replace(MACHINE, memory_available=1 << 20))
    with pytest.raises(CapacityError, match=r"does not fit.* 1\.05 MB are free"):
        Engine.open(EngineConfig(model_path=path, cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_the_engine_refuses_a_store_of_other_formats_than_the_plan(tmp_path) -> None:
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe")
    with (
        cached_store(source, tmp_path / "cache", "int8,head=bf16") as store,
        pytest.raises(ConfigError, match="the store has head bf16, rest int8, the plan is for int4"),
    ):
        Engine(store, plan_of(weight_format="int4"))


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
        ({"weight_format": "int8,head=int3"}, "int3"),
        ({"weight_format": "int8,tail=int4"}, "tail"),
        ({"kv_format": "int4"}, "--kv-format 'int4' .*bf16, int8, fp8"),
        ({"batch_invariant": "yes"}, "--batch-invariant 'yes'"),
    ],
)
def test_values_out_of_range_are_refused(choices, message) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(**choices)


def test_a_gpu_that_is_not_there_is_refused_with_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(usable, "why_unusable", lambda: "no NVIDIA driver is installed")
    with pytest.raises(ConfigError, match="--device cuda .*: no NVIDIA driver is installed; use auto, cpu or sim"):
        plan_model(EngineConfig(device="cuda"))


@pytest.mark.parametrize(("threads", "placed"), [(None, True), (1, True), (3, True), (5, False)])
def test_threads_share_one_processor_a_core_where_there_are_enough(threads, placed) -> None:
    plan = plan_of(threads=threads)
    assert (plan.threads, plan.cpus) == (threads or 4, ((0, 2, 4, 6),) * placed)
    assert ("on processors 0,2,4,6," if placed else "on any processor,") in plan_text(plan)


def test_the_printed_plan_names_every_part() -> None:
    plan = plan_of()
    text = plan_text(plan)
    for part in (*plan.weight_bytes, "arena", "scratch", "logits", "KV", "memory free", "avx2", "4 threads", "fits"):
        assert part in text
    for kind in {op.kind for op in plan.ops if op.layer in (None, 0)}:
        assert kind in text
    assert json.loads(json.dumps(plan.to_dict()))["ops"] == len(plan.ops)


def test_sinks_biases_and_the_clamped_activation_are_planned() -> None:
    spec = spec_of()
    *first, last = spec.layers
    assert last.feed_forward.router is not None
    router = replace(last.feed_forward.router, kind="topk_softmax", bias=True)
    ffn = replace(last.feed_forward, activation="swiglu_clamped", bias=True, router=router)
    layers = (*first, replace(last, mixer=replace(last.mixer, sinks=True), feed_forward=ffn))
    more = {
        part: size - plan_of().weight_bytes[part]
        for part, size in plan_of(replace(spec, layers=layers)).weight_bytes.items()
    }
    biases = 10 * (3 * 32 + 96) * 4  # of 10 experts, gate and up [40 padded to 48] and down [96]
    assert {part: size for part, size in more.items() if size} == {
        "experts": biases,
        "attention": 6 * 4,
        "router": 10 * 4,
    }


@pytest.mark.parametrize(
    ("family", "text", "line"),
    [
        ("qwen3_moe", "auto", "experts bf16, dense bf16, attention bf16, head bf16; keys and values fp8"),
        ("qwen3_moe", "int4,head=int8", "experts int4, dense int4, attention int4, head int8; keys and values fp8"),
        ("mixtral", "fp8", "experts fp8, attention fp8, head bf16; keys and values fp8"),
        ("llama", "mxfp4", "dense bf16, attention bf16, head bf16; keys and values fp8"),
    ],
)
def test_the_formats_of_what_the_model_has_are_a_line(family, text, line) -> None:
    plan = plan_of(spec_of(family), weight_format=text, kv_format="fp8")
    assert f"formats: {line}" in plan_text(plan).splitlines()
    told = plan.to_dict()
    assert (told["kv_format"], told["batch_invariant"]) == ("fp8", True)
    assert told["formats"] == plan.formats.to_dict() and set(told["formats"].values()) <= set(FORMATS)


def test_a_shared_expert_is_a_part_of_its_own() -> None:
    """By hand: gate and up [56, 96], down [96, 56] of two layers in fp8, whose blocks have a header of 64 bytes."""
    plan = plan_of(spec_of("qwen2_moe"), weight_format="bf16,shared=fp8")
    assert plan.weight_bytes["shared"] == 2 * (2 * 4 * (64 + 128 * 16) + 6 * (64 + 64 * 16))
    assert plan.weight_bytes["router"] == 2 * (8 + 1) * 96 * 4
    assert "experts bf16, shared fp8, dense bf16" in plan.format_text


def test_the_words_of_the_flag_are_those_of_the_mixes() -> None:
    assert ("auto", *MIXES) == WEIGHT_FORMATS


def test_a_plan_is_the_same_for_the_same_input() -> None:
    assert plan_of() == plan_of()
    assert dataclasses.asdict(plan_of(chunk_size=64)) != dataclasses.asdict(plan_of())


def test_a_feed_forward_that_no_device_computes_is_not_helped_by_shorter_sequences(tmp_path) -> None:
    config = EngineConfig(
        model_path=write_checkpoint(tmp_path / "hf", "afmoe"), weight_format="bf16", step_on="torch-cpu",
        device="simulated",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"no device computes \(\w+\); use --step-on threads$"):
        plan_model(config)
