"""bench/kernels.py times what it says, on data that mean something, and counts what tile_passes.h does."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import ISAS, OTHER_ON_TILES, dequantised_rows, grouped_row_parts, int8_row_parts
from typer.testing import CliRunner

import cpu_kernels
from hybrid.config import KV_FORMATS
from hybrid.errors import CapacityError
from hybrid.formats import FORMATS, GROUPED
from hybrid.formats.packed import down_offset, expert_bytes, packed_bytes

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import kernel_cases
import kernels
import tile_counts
from kernel_cases import Attention, Gemm, Moe, Shape

SOURCES = Path(__file__).parent.parent / "cpu_kernels" / "src"
SHAPE = Shape(
    hidden=96, experts=8, top_k=3, intermediate=40, columns=50, heads=4, kv_heads=2, head_dim=24, depth=300
)  # fmt: skip
SIZES = [
    word
    for name, value in vars(SHAPE).items()
    for word in (f"--{name.replace('_', '-')}", str(value))
]  # fmt: skip
TOLERANCE = 0.02  # bf16 and int8 activations


@pytest.fixture(autouse=True)
def little(monkeypatch) -> None:
    monkeypatch.setattr(kernel_cases, "COLD_BYTES", 1 << 17)
    monkeypatch.setattr(kernels, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(kernels, "PROBE_ROUNDS", 1000)
    monkeypatch.setattr(kernels, "BARRIERS", 100)


@pytest.fixture
def pool() -> cpu_kernels.ThreadPool:
    return cpu_kernels.ThreadPool(1, [])


@pytest.fixture(params=FORMATS)
def format(request) -> str:
    return str(request.param)


# What is computed


def blob(weights: kernel_cases.Weights, size: int, index: int) -> np.ndarray:
    memory = (kernel_cases.ctypes.c_uint8 * size).from_address(weights.address + index * size)
    return np.ctypeslib.as_array(memory)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.linalg.norm(found - expected) < TOLERANCE * np.linalg.norm(expected)


def test_a_gemm_multiplies_every_row_and_column(pool, format) -> None:
    weights = kernel_cases.gemm_weights(SHAPE, format)
    size = packed_bytes(format, 50, 96)
    assert weights.copies >= (1 << 17) / size
    assert bytes(blob(weights, size, 0)) == bytes(blob(weights, size, weights.copies - 1))
    w = FORMATS[format].unpack(blob(weights, size, 0).reshape(4, -1), 50, 96)
    for rows in (1, 5, 40):
        case = Gemm(pool, ISAS[0], SHAPE, weights, rows)
        assert case.calls == (weights.copies if rows <= 32 else 2)
        assert case.run() > 0
        x = dequantised_rows(format, kernel_cases.activation_rows(rows, 96, format), 96)
        assert close(case.output[:, :50], x @ w.T) and not case.output[:, 50:].any()
        assert case.cost.bytes == case.calls * size
        done = case.cost.int_ops if FORMATS[format].integer else case.cost.flops
        assert done == case.calls * 2 * rows * 96 * 50 == case.cost.int_ops + case.cost.flops


@pytest.mark.parametrize(("rows", "routing"), [(1, "even"), (1, "random"), (20, "even"), (20, "random")])
def test_a_moe_layer_computes_all_its_experts(pool, format, rows, routing) -> None:
    """The experts are alike and have equal weight, so each call adds what one of them gives."""
    weights = kernel_cases.expert_weights(SHAPE, format)
    size = expert_bytes(format, 96, 40)
    case = Moe(pool, ISAS[0], SHAPE, weights, rows, routing)
    assert weights.copies == 8 and case.calls == (3 if rows == 1 else 1)
    case.run()
    x = dequantised_rows(format, kernel_cases.activation_rows(rows, 96, format), 96)
    one = np.array_split(blob(weights, size, 7), [down_offset(format, 96, 40)])
    gate_up = one[0].reshape(3, 2, -1)
    # of whole blocks: the last is as full as the others, and weights of inputs beyond 40 are not zero in every format
    gate, up = (FORMATS[format].unpack(np.ascontiguousarray(gate_up[:, i]), 48, 96) for i in (0, 1))
    down = FORMATS[format].unpack(one[1].reshape(6, -1), 96, 48)
    expected = case.calls * (silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert close(case.output[:, :96], expected) and not case.output[:, 96:].any()
    chosen = kernel_cases.choose_experts(SHAPE, routing, case.calls, rows)
    assert case.cost.bytes == size * sum(len(set(ids.flat)) for ids in chosen)
    assert case.cost.int_ops + case.cost.flops == 2 * chosen.size * 3 * 96 * 40


def test_experts_are_chosen_evenly_or_at_random() -> None:
    even = kernel_cases.choose_experts(SHAPE, "even", 2, 4)
    random = kernel_cases.choose_experts(SHAPE, "random", 50, 4)
    assert set(np.bincount(even.ravel())) == {3}
    assert all(len(set(row)) == 3 for ids in (even, random) for row in ids.reshape(-1, 3))
    counts = np.bincount(random.ravel(), minlength=8)
    assert 0 < counts.min() < counts.max()


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("decode", [True, False])
def test_attention_sees_all_the_keys(pool, kv_format, decode) -> None:
    """All keys and values are alike, so what is attended to is that value."""
    case = Attention(pool, ISAS[0], SHAPE, kv_format, 3, decode)
    case.run()
    scale = np.full(4, kernel_cases.KV_BYTE, np.uint8).view(np.float32)[0]
    value = {"bf16": scale, "int8": kernel_cases.KV_BYTE * scale, "fp8": 1.5 * scale}[kv_format]
    found = case.output.astype(np.float32)[:, : 4 * 24]
    assert np.allclose(found, value, rtol=0.02)
    token = 2 * {"bf16": 2 * (32 + 32), "int8": 32 + 32 + 8, "fp8": 32 + 32 + 8}[kv_format]
    sequences, tokens = (3, 301) if decode else (1, 303)
    assert case.calls > 1 and case.cost.bytes == case.calls * sequences * tokens * token
    pairs = 3 * 301 if decode else 301 + 302 + 303
    assert case.cost.flops == case.calls * 4 * pairs * 4 * 24


def test_int8_rows_are_whole() -> None:
    rows = kernel_cases.activation_rows(2, 300, "int8")
    values, sums, scales = (np.ascontiguousarray(rows[:, part]) for part in int8_row_parts(300))
    assert (values.view(np.int8).reshape(2, -1, 32).sum(-1) == sums.view(np.int32)).all()
    assert (scales.view(np.float32) == np.float32(1 / 127)).all()
    grouped = kernel_cases.activation_rows(2, 300, "q4_1")
    values, groups = (np.ascontiguousarray(grouped[:, part]) for part in grouped_row_parts(300))
    scales, sums, *halves = groups.view(np.float32).reshape(2, -1, 4).transpose(2, 0, 1)
    assert (scales == np.float32(1 / 127)).all()
    exact = values.view(np.int8).reshape(2, -1, 2, 16).sum(-1, dtype=np.float32)
    assert (sums == scales * exact.sum(-1)).all()
    assert (halves == scales * np.moveaxis(exact, -1, 0)).all()


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch) -> None:
    monkeypatch.setattr(kernel_cases, "memory", lambda: (2 * 10**9, 10**9))
    with pytest.raises(CapacityError, match=r"2\.0 GB are needed at once, 1\.0 GB are free; lower --experts"):
        kernel_cases.Memory().bytes(2 * 10**9)


# What AMX would issue


@pytest.mark.parametrize(
    ("format", "rows", "columns", "inputs", "loads", "products", "stores"),
    [
        ("bf16", 6, 64, 256, 0, 0, 0),  # AVX-512
        ("bf16", 7, 64, 256, 8 * 5, 8 * 4, 4),  # 1 x 4
        ("bf16", 16, 64, 256, 8 * 5, 8 * 4, 4),
        ("bf16", 17, 64, 256, 2 * 8 * 4, 2 * 8 * 4, 2 * 4),  # 2 x 2, twice
        ("bf16", 32, 32, 512, 16 * 4 + 4, 16 * 4, 2 * 4),  # sums of the first panel come back
        ("bf16", 33, 112, 256, 8 * (4 * 3 + 3) + 8 * (5 + 2 * 3), 8 * (4 * 3 + 2) + 8 * (4 + 3), 14 + 7),
        ("mxfp4", 32, 32, 256, 8 * 4, 8 * 4, 4),
        ("fp8", 32, 32, 256, 8 * 4, 8 * 4, 2 * 4),
        ("fp8", 32, 32, 64, 2 * 4, 2 * 4, 4),
        ("int8", 32, 32, 256, 4 * 4, 4 * 4, 4),
        ("int8", 32, 20, 512, 8 * 4, 8 * 4, 2 * 4),
        ("int4", 32, 32, 256, 4 * 4, 4 * 4, 4),  # opened to bytes
        ("q4_0", 32, 32, 256, 8 * 4, 8 * 4, 4),  # opened to bf16
    ],
)
def test_tiles_are_counted(format, rows, columns, inputs, loads, products, stores) -> None:
    counts = tile_counts.count(format, rows, columns, inputs)
    assert (counts.loads, counts.products, counts.stores) == (loads, products, stores)


def cycles(format: str, rows: int, columns: int) -> tuple[float, float]:
    counts = tile_counts.count(format, rows, columns, 256)
    return counts.multiplying, counts.moving


def test_cycles_are_those_of_the_published_figures() -> None:
    """A product 16, a line from the near cache 1/2, from the far one 4/3, a stored one 1; sums are ready after 52."""
    assert cycles("bf16", 16, 64) == pytest.approx((8 * 64, 8 * 16 * (4 * 4 / 3 + 1 / 2) + 4 * 16))
    assert cycles("bf16", 32, 32) == pytest.approx((8 * 64, 8 * 32 * (4 / 3 + 1 / 2) + 4 * 16))
    assert cycles("bf16", 16, 16)[0] == 8 * 52
    assert cycles("q4_0", 32, 32) == cycles("bf16", 32, 32)


def test_the_share_is_that_of_multiplying_whole_tiles() -> None:
    rows = tile_counts.tile_report(Shape(columns=64, hidden=256), ["bf16", "int4"], [6, 16, 32])["results"]
    shares = {(row["format"], row["rows"]): row["issue_share"] for row in rows}
    assert shares["bf16", 6] is None and shares["int4", 6] is None
    assert shares["bf16", 16] == pytest.approx(16 * 64 * 256 / 512 / max(cycles("bf16", 16, 64)), abs=1e-4)
    assert shares["int4", 32] == pytest.approx(32 * 64 * 256 / 1024 / max(cycles("int4", 32, 64)), abs=1e-4)


def test_the_counts_are_those_of_the_kernels() -> None:
    """The blocking that is counted stands in the kernels too."""

    def constant(file: str, name: str) -> int:
        return int(re.search(rf"\b{name} = (\d+)", (SOURCES / file).read_text())[1])

    assert constant("executor/step.h", "kTileRows") == tile_counts.TILE_ROWS
    assert constant("executor/step.h", "kPanelInputs") == tile_counts.PANEL_INPUTS
    for format, rows in tile_counts.FIRST_ROWS.items():
        file = "grouped" if format in GROUPED else {"mxfp4": "fp4", "fp8_row": "fp8"}.get(format, format)
        assert constant(f"formats/{file}.h", "tile_rows") == rows
    assert tile_counts.FIRST_ROWS | OTHER_ON_TILES == tile_counts.FIRST_ROWS
    assert constant("isa/avx512_bf16.h", "max_blocks") == tile_counts.MAX_BLOCKS
    assert constant("executor/step.h", "kScaleInputs") == tile_counts.SEGMENTS["int8"]
    assert tile_counts.SEGMENTS["int4"] == tile_counts.SEGMENTS["int8"]


# The command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(kernels.app, [*SIZES, "--threads", "1", "-r", "2", *arguments])


def report(*arguments: str) -> str:
    result = run("--isa", ISAS[0], *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_case_is_measured_beside_the_limits(monkeypatch) -> None:
    run_case = kernel_cases.Case.run  # what a busy machine takes longer for would be rounded to no speed at all
    monkeypatch.setattr(kernel_cases.Case, "run", lambda case: min(run_case(case), 1e-3))
    found = json.loads(report("--formats", "bf16,int8", "--kv-format", "bf16", "--rows", "1,40", "--output", "json"))
    places = [(r["op"], r["routing"], r["format"], r["rows"]) for r in found["results"]]
    assert places == [
        *[("moe", routing, f, n) for f in ("bf16", "int8") for routing in ("even", "random") for n in (1, 40)],
        *[("gemm", "", f, n) for f in ("bf16", "int8") for n in (1, 40)],
        ("decode", "", "bf16", 1),
        ("prefill", "", "bf16", 40),
    ]
    for r in found["results"]:
        assert r["isa"] == ISAS[0]
        assert min(r[name] for name in ("microseconds", "gbps", "gops", "limit_share")) > 0, r
    machine = found["machine"]
    assert machine["threads"] == 1 and machine["shape"] == vars(SHAPE) and machine["barrier_ns"] >= 0
    assert set(machine["limits"][ISAS[0]]) == {"read", "bf16", "int8"}


def test_speeds_follow_from_time_and_cost(monkeypatch) -> None:
    class Fixed(kernel_cases.Case):
        def __init__(self) -> None:
            self.calls, self.cost = 4, kernel_cases.Cost(8e9, 2e9)

        def run(self) -> float:
            return 2.0

    class Limits:
        def measure(self, isa: str, integer: bool) -> None:
            assert (isa, integer) == ("avx2", False)

        def seconds(self, isa: str, cost: kernel_cases.Cost) -> float:
            return 1.5

    key = kernels.Key("gemm", "", "bf16", "avx2", 7)
    (row,) = kernels.measure(key, Fixed(), Limits(), 3, [])
    assert row == key._asdict() | {"microseconds": 500_000, "gbps": 4, "gops": 1, "limit_share": 0.75}


def test_ways_to_read_take_turns(pool) -> None:
    class Noted(kernel_cases.Case):
        def __init__(self) -> None:
            self.calls, self.cost, self.ways = 1, kernel_cases.Cost(8e9, 2e9), []

        def run(self) -> float:
            self.ways.append(cpu_kernels.reading().name)
            return 2.0

    before, case = cpu_kernels.reading(), Noted()
    rows = kernels.measure(kernels.Key("gemm", "", "bf16", ISAS[0], 7), case, kernels.Probe(pool), 2, ["near", "far"])
    assert case.ways == [before.name, "near", "far", "near", "far"] and cpu_kernels.reading() == before
    assert [row["reading"] for row in rows] == ["near", "far"]


def test_the_limit_is_the_slower_of_reading_and_multiplying(pool) -> None:
    limits = kernels.Probe(pool)
    limits.samples["avx2", "read"] = [1.0, 100.0, 300.0]
    limits.samples["avx2", "bf16"] = [50.0]
    limits.samples["avx2", "int8"] = [500.0]
    assert limits.seconds("avx2", kernel_cases.Cost(400, 10)) == 2
    assert limits.seconds("avx2", kernel_cases.Cost(400, 150)) == 3
    assert limits.seconds("avx2", kernel_cases.Cost(400, 0, 1500)) == 3


@pytest.mark.parametrize("arguments", [("--ops", "gemm", "--rows", "1"), ("--count-tiles", "--rows", "1,32")])
def test_the_report_in_three_forms(arguments) -> None:
    arguments = (*arguments, "--formats", "int8")
    (*_, row) = json.loads(report(*arguments, "--output", "json"))["results"]
    (*_, line) = csv.DictReader(report(*arguments, "--output", "csv").splitlines())
    assert list(line) == list(row) and line["format"] == "int8" and line["rows"] == str(row["rows"])
    head, rule, *_, last = [text for text in report(*arguments).splitlines() if text.startswith("|")]
    assert head.count("|") == rule.count("|") == last.count("|") == len(row) + 1 and last.endswith("% |")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ops", "conv"], ["--ops 'conv'", "moe, gemm, attention"]),
        (["--formats", "bf16,int3"], ["int3", "bf16, int8, int4, fp8, mxfp4"]),
        (["--kv-format", "int4"], ["--kv-format 'int4'", "bf16, int8, fp8"]),
        (["--routing", "odd"], ["odd", "even, random"]),
        (["--isa", "sse9"], ["'sse9' is unknown"]),
        (["--reading", "far,fast"], ["--reading 'fast' is unknown", "far, near, ordered"]),
        (["--rows", "1,x"], ["'1,x'", "128,512"]),
        (["--rows", "0"], ["--rows 0"]),
        (["-r", "0"], ["--repetitions 0"]),
        (["--threads", "0"], ["--threads 0"]),
        (["--output", "xml"], ["xml", "md, csv, json"]),
        (["--hidden", "0"], ["--hidden 0"]),
        (["--depth", "-1"], ["--depth -1"]),
        (["--top-k", "9"], ["--top-k 9", "--experts 8"]),
        (["--heads", "3"], ["--heads 3", "--kv-heads 2"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values_are_one_line_and_exit_code_2(arguments, words) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_the_default_instruction_sets_are_those_meant_to_be_fast(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "available_isas", lambda: ["avx2", "portable"])
    assert kernels.choose_isas(None) == ["avx2"] and kernels.choose_isas("portable, avx2") == ["portable", "avx2"]
    monkeypatch.setattr(cpu_kernels, "available_isas", lambda: ["portable"])
    assert kernels.choose_isas(None) == ["portable"]
