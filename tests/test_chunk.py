"""`--chunk-size auto`: grows with what a machine multiplies for each byte it reads, within bounds, and says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from configs import CONFIGS

from hybrid.config import CHUNK_SIZE, EngineConfig, check_config
from hybrid.errors import ConfigError
from hybrid.formats.mix import FormatMix
from hybrid.machine.hardware import HardwareSpec
from hybrid.machine.rates import Rates
from hybrid.models import model_spec
from hybrid.plan.chunk import MOST, STEP_SECONDS, fastest_chunk
from hybrid.plan.plan import BUFFER_SHARE, make_plan
from hybrid.plan.text import plan_text

BF16 = FormatMix.uniform("bf16")
WIDE = {
    "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768,
    "max_position_embeddings": 32768,
}  # fmt: skip
MACHINE = HardwareSpec(
    cpu_model="test", cpus=(0, 1), default_threads=2, memory_total=64 << 30, memory_available=32 << 30, isa="avx2",
    isas=("avx2",),
)  # fmt: skip


def rows(flops: float, read: float = 200e9, length: int = 32768, **changes: Any) -> int:
    spec = model_spec({**CONFIGS["qwen3_moe"], **WIDE, **changes})
    return fastest_chunk(spec, BF16, "bf16", Rates(read, flops, 2 * flops), CHUNK_SIZE, length).rows


def test_a_machine_that_multiplies_more_for_each_byte_takes_larger_chunks() -> None:
    chosen = [rows(flops) for flops in (0.3e12, 3e12, 10e12, 30e12, 100e12)]
    assert chosen == sorted(chosen) and chosen[0] == CHUNK_SIZE < chosen[-2] <= chosen[-1] <= MOST
    assert rows(30e12, read=20e12) == CHUNK_SIZE  # what is read is no bound
    assert rows(30e12, num_experts=8, num_experts_per_tok=2) < rows(30e12)


def test_a_chunk_is_bounded_by_the_context_and_by_time() -> None:
    assert rows(100e12, length=1024) <= 1024
    assert rows(100e12, length=64) == CHUNK_SIZE
    slow = model_spec({**CONFIGS["qwen3_moe"], **WIDE})
    found = fastest_chunk(slow, BF16, "bf16", Rates(1e8, 15e9), CHUNK_SIZE, 32768)
    assert found.rows == CHUNK_SIZE and f"above {STEP_SECONDS:g} s" in found.why
    unknown = fastest_chunk(slow, BF16, "bf16", Rates(1e9), CHUNK_SIZE, 32768)
    assert (unknown.rows, unknown.why) == (CHUNK_SIZE, "the operations of the machine are not known")


def test_the_plan_says_what_was_chosen_and_why() -> None:
    spec, config = model_spec({**CONFIGS["qwen3_moe"], **WIDE}), EngineConfig(chunk_size="auto", device="cpu")
    rates = Rates(200e9, 30e12, 60e12)
    large = make_plan(spec, MACHINE, config, BF16, rates)
    fixed = make_plan(spec, MACHINE, replace(config, chunk_size=CHUNK_SIZE), BF16, rates)
    assert large.max_rows > fixed.max_rows == CHUNK_SIZE and not fixed.chunk_note
    line = next(line for line in plan_text(large).splitlines() if line.startswith("chunk: "))
    assert line.startswith(f"chunk: {large.max_rows} tokens: ") and "for an expert; the machine reads 200 GB/s" in line
    growth = large.fixed_bytes - fixed.fixed_bytes
    tight = replace(MACHINE, memory_available=fixed.fixed_bytes + growth * BUFFER_SHARE // 2)
    small = make_plan(spec, tight, config, BF16, rates)
    assert CHUNK_SIZE <= small.max_rows < large.max_rows and "more would take too much memory" in small.chunk_note
    assert make_plan(spec, MACHINE, config, BF16).max_rows == CHUNK_SIZE  # of a machine that was not measured


def test_a_context_that_memory_shortens_may_give_up_a_little_more_for_a_chunk() -> None:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 24}
    spec = model_spec({**CONFIGS["qwen3_moe"], **WIDE, **heads})
    fixed = EngineConfig(device="cpu")
    weights = make_plan(spec, MACHINE, fixed, BF16).fixed_bytes
    tight = replace(MACHINE, memory_total=1 << 40, memory_available=weights + (9 << 27))
    usual = make_plan(spec, tight, fixed, BF16)
    chosen = make_plan(spec, tight, replace(fixed, chunk_size="auto"), BF16, Rates(200e9, 30e12, 60e12))
    assert chosen.max_rows > usual.max_rows and chosen.max_seq_len < usual.max_seq_len < 32768 and not chosen.problem


def test_beside_a_device_and_many_sequences_the_fewest_rows_are_taken() -> None:
    spec = model_spec({**CONFIGS["qwen3_moe"], **WIDE})
    config = EngineConfig(chunk_size="auto", device="simulated")
    plan = make_plan(spec, MACHINE, config, BF16, Rates(200e9, 30e12))
    assert plan.max_rows == CHUNK_SIZE and "beside a device" in plan.chunk_note
    many = make_plan(spec, MACHINE, EngineConfig(chunk_size="auto", max_batch=600, device="cpu"), BF16)
    assert many.max_rows == 600


@pytest.mark.parametrize("value", ["most", "", 0, 2.5, None])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="^--chunk-size "):
        check_config(EngineConfig(chunk_size=value))  # type: ignore[arg-type]
