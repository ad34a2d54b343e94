"""`hybrid bench` reports what was measured, beside the limits of the machine, in three forms."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid import measure
from hybrid.bench import app
from hybrid.models import model_spec
from hybrid.roofline import step_cost


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch) -> None:
    monkeypatch.setattr(measure, "PROBE_BYTES", measure._TOUCH_BYTES)
    monkeypatch.setattr(measure, "PROBE_ROUNDS", 10_000)


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
    assert set(report) == {"machine", "results"}
    machine = report["machine"]
    assert machine["read_gbps"] > 0 and machine["peak_gflops"]["bf16"] > 0 and machine["threads"] == 2
    assert {"cpu", "isa", "memory_gb", "model", "weights_gb"} <= set(machine)
    keys = {"test", "depth", "batch", "tokens_per_second", "stddev", "limit_share"}
    assert all(set(result) == keys for result in report["results"])
    assert {(r["test"], r["depth"], r["batch"]) for r in report["results"]} == {
        (test, depth, batch) for test in ("pp8", "pp3", "tg2") for depth in (0, 5) for batch in (1, 2)
    }
    assert all(r["tokens_per_second"] > 0 and r["stddev"] >= 0 and r["limit_share"] > 0 for r in report["results"])


def test_csv_and_markdown_have_a_row_for_every_test(cache) -> None:
    rows = list(csv.DictReader(bench(cache, "-p", "8", "-n", "2", "-r", "1", "--output", "csv").splitlines()))
    assert [(row["test"], row["stddev"]) for row in rows] == [("pp8", "0.0"), ("tg2", "0.0")]
    lines = bench(cache, "-p", "0", "-n", "2", "-r", "1").splitlines()
    assert "GB/s" in lines[0] and "GFLOP/s" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["test", "---", "tg2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "many"], ["many", "128,512"]),
        (["-n", "-1"], ["-1"]),
        (["-p", "0", "-n", "0"], ["--prompt", "--generate"]),
        (["--batch", "0"], ["--batch", "0"]),
        (["-r", "0"], ["--repetitions", "0"]),
        (["--output", "xml"], ["xml", "md, csv, json"]),
        (["--threads", "0"], ["--threads", "0"]),
        (["--format", "int3"], ["int3", "bf16"]),
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


def test_the_cost_of_a_step_is_that_of_its_parts() -> None:
    """One layer of round sizes, counted by hand."""
    spec = model_spec(
        {
            "model_type": "qwen3_moe",
            "vocab_size": 1000,
            "hidden_size": 100,
            "num_hidden_layers": 1,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
            "head_dim": 10,
            "moe_intermediate_size": 50,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        }
    )
    attention, expert, router, head = 100 * 10 * 30, 3 * 100 * 50, 8 * 100, 100_000
    one = step_cost(spec, sequences=1, rows=1, depth=99, logit_rows=1)
    assert one.bytes == pytest.approx(2 * (attention + 2 * expert + head) + 4 * router + 2 * 100 * 100)
    assert one.flops == pytest.approx(2 * (attention + router + 2 * expert + head) + 4 * 100 * 100)
    many = step_cost(spec, sequences=4, rows=1000, depth=0, logit_rows=0)
    assert many.bytes == pytest.approx(2 * (attention + 8 * expert) + 4 * router + 4 * 1000 * 2 * 100)
    assert many.flops == pytest.approx(8000 * (attention + router + 2 * expert) + 4 * 4 * 500_500 * 100)
    assert one.seconds(1e3, 1e9) == one.bytes / 1e3 and one.seconds(1e12, 1e3) == one.flops / 1e3
