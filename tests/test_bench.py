"""`hybrid bench` reports what was measured, beside the limits of the machine, in three forms."""

from __future__ import annotations

import csv
import ctypes
import json
import statistics
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import hybrid
from hybrid.commands import measure
from hybrid.commands.bench import app
from hybrid.config import EngineConfig
from hybrid.engine.engine import Engine
from hybrid.formats.mix import MIXES, FormatMix, parse_mix
from hybrid.machine import rates
from hybrid.models import model_spec
from hybrid.models.layers.base import Cost
from hybrid.plan.roofline import step_cost, uses_integers


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch) -> None:
    monkeypatch.setattr(rates, "PROBE_BYTES", rates._TOUCH_BYTES)
    monkeypatch.setattr(rates, "PROBE_ROUNDS", 100_000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def bench(cache: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["--cache-dir", str(cache), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


SMALL = ("-p", "8,3", "-n", "2", "-d", "0,5", "--batch", "1,2", "-r", "2", "--threads", "2")


def test_json_has_the_machine_and_a_result_for_every_test(cache) -> None:
    report = json.loads(bench(cache, *SMALL, "--output", "json"))
    assert set(report) == {"version", "date", "model", "machine", "results"}
    assert report["version"] == hybrid.__version__ and datetime.fromisoformat(report["date"]).tzinfo
    assert set(report["model"]) == {"path", "type", "weights_gb", "format"} and report["model"]["path"] == "embedded"
    machine = report["machine"]
    assert machine["read_gbps"] > 0 and machine["peak_gflops"]["bf16"] > 0 and machine["threads"] == 2
    assert machine["device"] == "cpu"
    assert {"cpu", "isa", "memory_gb", "model", "weights_gb"} <= set(machine)
    assert (machine["format"], machine["kv_format"], set(machine["peak_gflops"])) == ("bf16", "bf16", {"bf16"})
    keys = {"test", "depth", "batch", "tokens_per_second", "samples", "stddev", "limit_share"}
    assert all(set(result) == keys and len(result["samples"]) == 2 for result in report["results"])
    for result in report["results"]:
        assert result["tokens_per_second"] == pytest.approx(statistics.median(result["samples"]), abs=0.02)
    assert {(r["test"], r["depth"], r["batch"]) for r in report["results"]} == {
        (test, depth, batch) for test in ("pp8", "pp3", "tg2") for depth in (0, 5) for batch in (1, 2)
    }
    assert all(r["tokens_per_second"] > 0 and r["stddev"] >= 0 and r["limit_share"] > 0 for r in report["results"])


def test_csv_and_markdown_have_a_row_for_every_test(cache) -> None:
    rows = list(csv.DictReader(bench(cache, "-p", "8", "-n", "2", "-r", "1", "--output", "csv").splitlines()))
    assert [(row["test"], row["stddev"]) for row in rows] == [("pp8", "0.0"), ("tg2", "0.0")]
    lines = bench(cache, "-p", "0", "-n", "2", "-r", "1").splitlines()
    assert "GB/s" in lines[0] and "GFLOP/s" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["test", "----", "tg2"]
    assert len({len(line) for line in lines[2:]}) == 1


@pytest.mark.parametrize(
    ("flags", "chunk"),
    [
        ((), 512),
        (("--chunk-size", "64"), 64),
        (("--batch", "600", "-p", "0", "-n", "1"), 600),
    ],
)
def test_prompts_are_read_in_chunks_of_the_size_that_is_asked_for(cache, flags, chunk, monkeypatch) -> None:
    rows: list[int] = []
    forward = Engine.forward

    def count(engine, step):
        rows.append(len(step.token_ids))
        return forward(engine, step)

    monkeypatch.setattr(Engine, "forward", count)
    report = json.loads(bench(cache, "-p", "700", "-n", "0", "-r", "1", *flags, "--output", "json"))
    assert report["machine"]["chunk_size"] == max(rows) == chunk


def test_a_chunk_that_was_chosen_is_explained(cache) -> None:
    flags = ("-p", "8", "-n", "0", "-r", "1", "--chunk-size", "auto")
    result = CliRunner().invoke(app, ["--cache-dir", str(cache), *flags])
    assert result.exit_code == 0, result.output
    assert "chunk: 512 tokens: " in result.stderr and "chunks of 512;" in result.stdout


def test_rows_are_printed_as_they_come(cache, monkeypatch) -> None:
    """The first is there when the second test fails."""

    def measure_one(engine, probe, measurement) -> None:
        if measurement.test.generate:
            raise KeyboardInterrupt
        measurement.tokens_per_second.append(1.0)
        measurement.limit_shares.append(0.5)

    monkeypatch.setattr(measure, "_measure", measure_one)
    for form in ("md", "csv"):
        arguments = ["--cache-dir", str(cache), "-p", "8", "-n", "2", "-r", "1", "--output", form]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 130 and "pp8" in result.stdout.splitlines()[-1]


def test_a_depth_is_filled_once_and_not_computed_whole(cache, monkeypatch) -> None:
    computed: list[tuple[int, int]] = []
    run_sequence = measure.run_sequence

    def count(engine, sequence, start, rows, logits) -> None:
        computed.append((start, rows))
        run_sequence(engine, sequence, start, rows, logits)

    monkeypatch.setattr(measure, "run_sequence", count)
    for kv_format in ("bf16", "int8"):
        computed.clear()
        flags = ("-p", "8", "-n", "2", "-d", "1900", "-r", "2", "--kv-format", kv_format, "--output", "csv")
        assert len(bench(cache, *flags).splitlines()) == 3
        assert computed == [(0, 512), (0, 512), (1900, 8), (1900, 8)]  # weights touched, filled, measured twice


def test_the_filled_state_is_that_of_the_first_tokens_over_and_over() -> None:
    with Engine.open(EngineConfig(device="cpu", threads=1, max_seq_len=1024, max_batch=1)) as engine:
        measure.run_sequence(engine, 0, 0, 256, logits=False)
        kv, base = engine.plan.kv, engine.addresses.kv._arena.address
        engine.addresses.repeat(0, 256, 1000)
        for offset, size in kv.layers[0].runs:
            width = size // kv.tokens
            run = np.frombuffer((ctypes.c_ubyte * (1000 * width)).from_address(base + offset), np.uint8)
            assert run[: 256 * width].any()
            assert (run[256 * width : 512 * width] == run[: 256 * width]).all()
            assert (run[768 * width :] == run[: 232 * width]).all()


def test_formats_are_measured_and_named(cache) -> None:
    flags = ("--format", "int8,head=fp8", "--kv-format", "int8", "-p", "8", "-n", "2", "-r", "1")
    report = json.loads(bench(cache, *flags, "--output", "json"))
    machine = report["machine"]
    assert (machine["format"], machine["kv_format"]) == ("head fp8, rest int8", "int8")
    assert set(machine["peak_gflops"]) == {"bf16", "int8"} and min(machine["peak_gflops"].values()) > 0
    assert all(result["tokens_per_second"] > 0 and result["limit_share"] > 0 for result in report["results"])
    line = bench(cache, *flags).splitlines()[0]
    assert all(
        word in line for word in ("(head fp8, rest int8)", "keys and values int8", "GFLOP/s (bf16)", "GOP/s (int8)")
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "many"], ["many", "128,512"]),
        (["-n", "-1"], ["-1"]),
        (["-p", "0", "-n", "0"], ["--prompt", "--generate"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["-r", "0"], ["--repetitions", "0"]),
        (["--output", "xml"], ["xml", "md, csv, json"]),
        (["--chunk-size", "8", "--batch", "1,16"], ["--chunk-size 8", "--batch 16"]),
        (["--threads", "0"], ["--threads", "0"]),
        (["--format", "int3"], ["int3", "bf16"]),
        (["--format", "int8,tail=int4"], ["tail=int4", "head"]),
        (["--kv-format", "mxfp4"], ["--kv-format", "mxfp4", "bf16, int8, fp8"]),
        (["--model-path", "/missing/model"], ["/missing/model"]),
        (["-d", "1000000000"], ["--depth", "1000000"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values_are_one_line_and_exit_code_2(cache, arguments, words) -> None:
    result = CliRunner().invoke(app, ["--cache-dir", str(cache), *arguments])
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_names_and_lengths_of_tests() -> None:
    assert (measure.Test(512, 0, 100, 1).name, measure.Test(512, 0, 100, 1).length) == ("pp512", 612)
    assert (measure.Test(0, 32, 0, 4).name, measure.Test(0, 32, 0, 4).length) == ("tg32", 32)


SPEC = model_spec(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 1024,
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
)  # one layer of sizes that need no padding
QKV, OUT, EXPERT, ROUTER, HEAD = 512 * 128, 128 * 256, 3 * 128 * 64, 8 * 128, 1024 * 128
KV_WIDTH, Q_WIDTH = 2 * 4 * 32, 8 * 32


def cost_of(text: str, kv_format: str = "bf16", **step: int) -> Cost:
    return step_cost(SPEC, parse_mix(text, FormatMix.uniform("bf16")), kv_format, **step)


def test_the_cost_of_a_step_is_that_of_its_parts() -> None:
    """Counted by hand, in bf16."""
    one = cost_of("bf16", sequences=1, rows=1, depth=99, logit_rows=1)
    assert one.bytes == pytest.approx(2 * (QKV + OUT + 2 * EXPERT + HEAD) + 4 * ROUTER + 2 * 100 * KV_WIDTH)
    assert one.flops == pytest.approx(2 * (QKV + OUT + ROUTER + 2 * EXPERT + HEAD) + 4 * 100 * Q_WIDTH)
    many = cost_of("bf16", sequences=4, rows=1000, depth=0, logit_rows=0)
    assert many.bytes == pytest.approx(2 * (QKV + OUT + 8 * EXPERT) + 4 * ROUTER + 2 * 4 * 1000 * KV_WIDTH)
    assert many.flops == pytest.approx(8000 * (QKV + OUT + ROUTER + 2 * EXPERT) + 4 * 4 * 500_500 * Q_WIDTH)
    assert (one.int_ops, many.int_ops) == (0, 0)


@pytest.mark.parametrize(
    ("format", "projections", "head", "expert", "integer"),
    [
        ("int8", QKV + OUT + 40 * 64, HEAD + 64 * 64, EXPERT + 16 * 64, True),
        ("int4", (QKV + OUT) * 9 / 16, HEAD * 9 / 16, EXPERT * 9 / 16, True),
        ("q8_0", (QKV + OUT) * 17 / 16, HEAD * 17 / 16, EXPERT * 17 / 16, True),
        ("fp8", QKV + OUT + 40 * 64, HEAD + 64 * 64, EXPERT + 16 * 64, False),
        ("mxfp4", (QKV + OUT) * 17 / 32, HEAD * 17 / 32, EXPERT * 17 / 32 + 8 * 32, False),
    ],
)
def test_every_format_counts_its_own_bytes_and_operations(format, projections, head, expert, integer) -> None:
    """By hand: 32 + 8 blocks of projections, 64 of the head, 8 + 8 of an expert; int8 and fp8 have a line of scales in
    each, int4 two bytes and mxfp4 one for 32 inputs and column, filled up to a line where an expert's down has 64."""
    parts = ",".join(f"{part}={format}" for part in ("experts", "attention", "head"))
    cost = cost_of(f"bf16,{parts}", sequences=1, rows=1, depth=99, logit_rows=1)
    assert cost.bytes == pytest.approx(projections + head + 2 * expert + 4 * ROUTER + 2 * 100 * KV_WIDTH)
    products, floats = 2 * (QKV + OUT + 2 * EXPERT + HEAD), 2 * ROUTER + 4 * 100 * Q_WIDTH
    assert cost.int_ops == (products if integer else 0)
    assert cost.flops == pytest.approx(floats if integer else floats + products)


def test_a_mix_counts_each_part_apart() -> None:
    step = {"sequences": 2, "rows": 3, "depth": 10, "logit_rows": 2}
    whole, mixed = cost_of("bf16", **step), cost_of("bf16,head=int8", **step)
    assert mixed.int_ops == 2 * 2 * HEAD and whole.flops - mixed.flops == mixed.int_ops
    assert whole.bytes - mixed.bytes == HEAD - 64 * 64
    assert [uses_integers(SPEC, parse_mix(text, FormatMix.uniform("bf16"))) for text in MIXES] == [
        False,
        True,
        True,
        *[False] * 4,  # of floats
        *[True] * 4,  # of GGUF
    ]
    assert not uses_integers(
        SPEC, parse_mix("bf16,dense=int8", FormatMix.uniform("bf16"))
    )  # the model has no dense layer


@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
def test_keys_and_values_count_a_byte_and_their_scales(kv_format) -> None:
    step = {"sequences": 3, "rows": 1, "depth": 99, "logit_rows": 0}
    saved = cost_of("bf16", **step).bytes - cost_of("bf16", kv_format, **step).bytes
    assert saved == pytest.approx(3 * 100 * (KV_WIDTH - 4 * 8))


def test_a_shared_expert_is_read_by_every_step_and_multiplied_by_every_row() -> None:
    """As wide as a routed one, in fp8: blocks of 64 bytes of scales and 16 columns; its gate is a row of the router."""
    layer = SPEC.layers[0]
    ffn = replace(layer.feed_forward, shared_intermediate=64, shared_gate=True)
    spec = replace(SPEC, layers=(replace(layer, feed_forward=ffn),))
    mix = parse_mix("bf16,shared=fp8", FormatMix.uniform("bf16"))
    step = {"sequences": 2, "rows": 50, "depth": 0, "logit_rows": 0}
    plain, shared = step_cost(SPEC, mix, "bf16", **step), step_cost(spec, mix, "bf16", **step)
    assert shared.bytes - plain.bytes == pytest.approx(EXPERT + 16 * 64 + 4 * 128)
    assert shared.flops - plain.flops == pytest.approx(2 * 100 * (EXPERT + 128))
    assert uses_integers(spec, parse_mix("bf16,shared=int8", FormatMix.uniform("bf16")))
    assert not uses_integers(SPEC, parse_mix("bf16,shared=int8", FormatMix.uniform("bf16")))


def test_the_time_of_a_step_is_the_slower_of_reading_and_multiplying() -> None:
    cost = Cost(bytes=100, flops=60, int_ops=80)
    assert cost.seconds(10, 1e9, 1e9) == 10
    assert cost.seconds(1e9, 10, 20) == pytest.approx(6 + 4)  # the same cores do both
    assert Cost(100, 60).seconds(1e9, 10) == 6
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
