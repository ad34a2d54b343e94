"""bench/device.py measures what it says and puts it beside the limits: in an interpreter, with clocks that are set.

On a GPU where there is one.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed: pip install '.[live]'")
torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import device as bench  # noqa: E402
import device_cases as cases  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from gpu_cache.errors import DeviceFull, DeviceLost, PinningRefused  # noqa: E402
from gpu_cache.kernels import reference  # noqa: E402
from gpu_cache.kernels.experts import FEW, FEW_ROWS, MANY, ExpertKernels, Tiling  # noqa: E402
from hybrid.errors import CapacityError, DeviceFailed  # noqa: E402
from hybrid.formats import FORMATS  # noqa: E402
from hybrid.machine import gpu as usable  # noqa: E402
from hybrid.models.layers.base import Cost  # noqa: E402
from hybrid.plan.expert_cache import SLOT_FORMATS  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TINY = bench.SHAPES["tiny"]
SAMPLE, COPIES = 2.0, 4.0  # seconds that the clocks of `Fixed` show
CANDIDATES = cases.FEW_TILINGS, cases.MANY_TILINGS
OTHERS = {True: (Tiling(2, 16, 2, 2), FEW), False: (Tiling(1, 16, 4, 4), MANY)}  # by whether there are few rows


class Fixed(cases.Place):
    """Does all work once, and has clocks of its own."""

    def device_seconds(self, work) -> float:
        super().device_seconds(work)
        return SAMPLE

    def host_seconds(self, streams, work) -> float:
        super().host_seconds(streams, work)
        return COPIES


@pytest.fixture(autouse=True)
def little(monkeypatch) -> None:
    monkeypatch.setattr(cases, "FULL", cases.TRIAL)
    monkeypatch.setattr(cases, "FEW_TILINGS", OTHERS[True])
    monkeypatch.setattr(cases, "MANY_TILINGS", OTHERS[False])
    monkeypatch.setattr(cases, "Place", Fixed)


@pytest.fixture(scope="module")
def place() -> cases.Place:
    return Fixed(DEVICE)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(bench.app, ["--device", DEVICE, "--shapes", "tiny", "-r", "1", *arguments])


def report(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def timed(layer, rows, routing, tiling, repetitions) -> cases.Sample:
    """In place of `time_experts`: a tiling that is faster than the others, and one that does not run."""
    if tiling == OTHERS[False][0]:
        raise OutOfResources(300_000, 200_000, "shared memory")
    return cases.Sample(0.5 if tiling == OTHERS[True][0] else 2.0, Cost(1e9, 1e3), True)


# The command


def test_every_case_is_measured_beside_the_limits() -> None:
    found = json.loads(report("--rows", "1,17", "--output", "json"))
    assert set(found) == {"machine", "results", "tuning"} and found["tuning"] == []
    names = [(r["op"], r["format"], r["rows"]) for r in found["results"]]
    assert names == [
        *[("experts", format, rows) for format in SLOT_FORMATS for rows in (1, 17)],
        *[(op, format, 0) for format in SLOT_FORMATS for op in ("staged copy", "pinned copy")],
    ]
    assert len({tuple(r) for r in found["results"]}) == 1, "rows of different columns"
    for r in found["results"]:
        assert r["shape"] == "tiny" and r["microseconds"] > 0 and r["limit_share"] > 0, r
    machine = found["machine"]
    assert machine["shapes"] == {"tiny": {"hidden": 64, "intermediate": 32, "experts": 4, "top_k": 2}}
    assert set(machine["limits"]) == {"read_gbps", "bf16_tflops", "copy_gbps"} and machine["notes"] == []
    names = ("device", "gpu", "gpu_memory", "capability", "cuda", "driver_cuda", "torch", "triton", "cpu", "system")
    assert set(names) < set(machine) and (machine["gpu"] is None) != ON_GPU


def test_shares_follow_from_the_clocks() -> None:
    """The limits are what the clocks make of the sizes, and so are the cases."""
    found = json.loads(report("--formats", "int8", "--rows", "1,20", "--output", "json"))
    sizes, (few, many, *copies) = cases.TRIAL, found["results"]
    read, flops = 2 * sizes.read_bytes / SAMPLE, 2 * cases.PRODUCTS * sizes.matrices[0] ** 3 / SAMPLE
    size = FORMATS["int8"].block_bytes(64) * 2 * 2 + FORMATS["int8"].block_bytes(64) * 4
    for row, rows, active in ((few, 1, 2), (many, 20, 4)):
        calls = max(sizes.calls, -(-sizes.cold_bytes // (active * size)))
        seconds = SAMPLE / calls
        operations = 2 * 3 * 64 * 32 * 2 * rows
        least = max(active * size / read, operations / flops)
        assert row["microseconds"] == pytest.approx(seconds * 1e6)
        assert row["limit_share"] == pytest.approx(least / seconds, abs=1e-4)
        assert row["bound"] == ("memory" if active * size / read > operations / flops else "arithmetic")
        assert row["launched"] == ("graph" if ON_GPU else "calls")
    assert (few["tiling"], many["tiling"]) == ("16x1", "64x4")
    count = len(cases.Layer(Fixed(DEVICE), TINY, "int8").memory)
    count = min(count, -(-sizes.cold_bytes // size))
    for row in copies:
        assert row["microseconds"] == pytest.approx(COPIES / count * 1e6)
        assert row["limit_share"] == pytest.approx(count * size / sizes.cold_bytes, abs=1e-4)
        assert (row["bound"], row["goal_share"]) == ("link", 0.9)


def test_tuning_lists_candidates_and_the_best(monkeypatch) -> None:
    monkeypatch.setattr(cases, "time_experts", timed)
    found = json.loads(report("--formats", "bf16", "--rows", "4,17", "--tune", "--output", "json"))
    few, many = found["tuning"]
    assert (few["default"], few["best"]) == ("16x1", "16x2 w2 s2")
    assert (few["microseconds"], few["best_microseconds"]) == (2e6, 5e5)
    assert [r["tiling"] for r in few["candidates"]] == ["16x2 w2 s2"] and few["refused"] == {}
    assert (many["best"], many["best_microseconds"], many["candidates"]) == ("64x4", 2e6, [])
    assert "shared memory" in many["refused"]["16x1 w4 s4"]
    lines = list(csv.DictReader(report("--formats", "bf16", "--rows", "4", "--tune", "--output", "csv").splitlines()))
    assert [line["op"] for line in lines] == ["experts", "staged copy", "pinned copy", "candidate"]
    assert lines[-1]["tiling"] == "16x2 w2 s2" and float(lines[-1]["microseconds"]) == 5e5


def test_candidates_are_measured() -> None:
    (case,) = json.loads(report("--formats", "bf16", "--rows", "1", "--tune", "--output", "json"))["tuning"]
    (row,) = case["candidates"]
    assert row["op"] == "candidate" and row["microseconds"] == case["microseconds"] == case["best_microseconds"] > 0
    assert case["refused"] == {} and case["best"] == case["default"], "the default one wins a tie"


def test_the_report_in_three_forms(monkeypatch) -> None:
    monkeypatch.setattr(cases, "time_experts", timed)
    arguments = ("--formats", "mxfp4", "--rows", "1,17", "--routing", "even,random", "--tune")
    found = json.loads(report(*arguments, "--output", "json"))
    lines = list(csv.DictReader(report(*arguments, "--output", "csv").splitlines()))
    rows = found["results"] + [row for case in found["tuning"] for row in case["candidates"]]
    assert [list(line) for line in lines] == [list(row) for row in rows]
    assert [(line["op"], line["routing"], line["rows"]) for line in lines] == [
        (row["op"], row["routing"], str(row["rows"])) for row in rows
    ]
    head, *tables = [text.splitlines() for text in report(*arguments).split("\n\n") if "|" in text or "torch" in text]
    assert "torch" in head[0] and len(tables) == 3
    for table, length in zip(tables, (4, 2, 4), strict=True):
        assert len(table) == length + 2 and len({line.count("|") for line in table}) == 1, table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "llama"], ["--shapes 'llama'", "mixtral, qwen3-30b, phi, tiny"]),
        (["--formats", "bf16,int3"], ["int3", "bf16, int8, int4, fp8, mxfp4"]),
        (["--routing", "odd"], ["odd", "even, random"]),
        (["--rows", "1,x"], ["'1,x'", "128,512"]),
        (["--rows", "0"], ["--rows 0"]),
        (["-r", "0"], ["--repetitions 0"]),
        (["--output", "xml"], ["xml", "md, csv, json"]),
        (["--device", "tpu"], ["--device 'tpu'", "cuda, cpu"]),
        (["--device", "cpu", "--shapes", "tiny,phi"], ["--shapes phi takes a GPU", "--device cpu"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values_are_one_line_and_exit_code_2(arguments, words) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_without_a_gpu_it_says_why(monkeypatch) -> None:
    monkeypatch.setattr(usable, "why_unusable", lambda: "no NVIDIA driver is installed")
    result = CliRunner().invoke(bench.app, [])
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "--device cuda cannot be had: no NVIDIA driver is installed" in line and "--device cpu" in line


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (DeviceFull("CUDA out of memory\nmore"), CapacityError, "CUDA out of memory; free memory"),
        (PinningRefused("pinned memory of 5 bytes is refused"), CapacityError, "pinned memory of 5"),
        (DeviceLost("an illegal access"), DeviceFailed, "an illegal access"),
        (OutOfResources(3, 2, "registers"), DeviceFailed, "registers"),
    ],
)
def test_what_a_gpu_refuses_is_one_of_our_errors(error, kind, words) -> None:
    with pytest.raises(kind, match=words) as found, cases.device_errors():
        raise error
    assert "\n" not in str(found.value)


# What is measured


def test_models_have_their_published_sizes() -> None:
    sizes = {name: tuple(bench._sizes(shape).values()) for name, shape in bench.SHAPES.items() if name != "tiny"}
    assert sizes == {
        "mixtral": (4096, 14336, 8, 2),
        "qwen3-30b": (2048, 768, 128, 8),
        "phi": (4096, 6400, 16, 2),
    }


@pytest.mark.parametrize(
    ("cost", "rows", "bound", "share", "goal"),
    [
        (Cost(3e9, 1e12), 8, "memory", 0.5, 0.75),
        (Cost(3e9, 1e12), 9, "memory", 0.5, None),
        (Cost(3e9, 3e12), 512, "arithmetic", 0.75, 0.6),
    ],
)
def test_the_limit_is_the_slower_of_reading_and_multiplying(cost, rows, bound, share, goal) -> None:
    limits = cases.Limits(read=3e12, flops=2e15, copy=1)
    row = bench.expert_row({"rows": rows}, FEW, cases.Sample(2e-3, cost, True), limits)
    assert (row["bound"], row["limit_share"], row["goal_share"]) == (bound, share, goal)
    assert (row["microseconds"], row["gbps"]) == (2000, 1500) and row["tflops"] == pytest.approx(cost.flops / 2e9)


@pytest.mark.parametrize("routing", ["even", "random"])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_row_hits_and_slots_take_turns(place, rows, routing) -> None:
    layer = cases.Layer(place, TINY, "bf16")
    assert (
        layer.layers * 4 * layer.layout.nbytes >= cases.TRIAL.cold_bytes > (layer.layers - 1) * 4 * layer.layout.nbytes
    )
    ids = layer.slot_ids(calls := 4 * layer.layers, rows, routing)
    assert ids.shape == (calls, rows, 2) and ids.min() >= 0 and ids.max() < len(layer.memory)
    assert all(len(set(row)) == 2 for row in ids.reshape(-1, 2))
    assert all(len(set(call.ravel() // 4)) == 1 for call in ids), "a call has experts of one layer"
    if routing == "even":
        assert set(ids.ravel()) == set(range(len(layer.memory)))


@pytest.mark.parametrize("format", SLOT_FORMATS)
def test_slots_hold_valid_experts(place, format) -> None:
    layer = cases.Layer(place, TINY, format)
    kernels = ExpertKernels(layer.layout, [layer.memory], 3, 2)
    slots = torch.from_numpy(layer.slot_ids(1, 3, "even")[0])
    x = torch.randn((3, 64), dtype=torch.bfloat16)
    found = kernels.run(x.to(place.device), slots.to(place.device)).cpu()
    memory = [layer.memory.cpu()]
    activation = reference.gate_up(x, slots, memory, layer.layout).bfloat16()
    wanted = reference.down(activation.float(), slots, memory, layer.layout).reshape(6, 64)
    assert wanted.abs().max() > 0 and (found - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def test_a_layer_that_does_not_fit_is_refused_with_the_numbers(monkeypatch, place) -> None:
    monkeypatch.setattr(Fixed, "free_bytes", lambda self: 1)
    with pytest.raises(
        CapacityError, match=r"a layer of 4 experts in int4 takes 0\.0 GB, .*; measure smaller --shapes"
    ):
        cases.Layer(place, TINY, "int4")


def test_what_cannot_be_pinned_is_noted(monkeypatch) -> None:
    class Refusing(cases.HostStreams):
        def pin(self, regions) -> None:
            raise PinningRefused("pinned memory is refused")

    place = Fixed("cpu")
    monkeypatch.setattr(place, "open_streams", Refusing)
    layer = cases.Layer(place, TINY, "bf16")
    layer.memory.zero_()
    assert list(cases.time_copies(layer, 1)) == ["staged copy"]
    assert place.notes == ["pinned memory is refused; no copies from pinned memory"]
    assert np.array_equal(layer.memory[1].numpy(), layer.expert)


# Tilings


@pytest.mark.parametrize("rows", [3, FEW_ROWS + 5])
@pytest.mark.parametrize("format", ["bf16", "mxfp4"])
def test_every_tiling_computes_the_same(place, format, rows) -> None:
    layer = cases.Layer(place, TINY, format)
    slots = torch.from_numpy(layer.slot_ids(1, rows, "random")[0]).to(place.device)
    x = torch.randn((rows, 64), dtype=torch.bfloat16).to(place.device)
    wanted = ExpertKernels(layer.layout, [layer.memory], rows, 2).run(x, slots)
    few, many = Tiling(4, 16, 2, 2), Tiling(2, 32, 8, 4)
    found = ExpertKernels(layer.layout, [layer.memory], rows, 2, few, many).run(x, slots)
    assert (found - wanted).abs().max() <= 2**-7 * wanted.abs().max()  # sums in other orders, rounded to bf16 between


def test_a_launch_has_the_options_that_are_chosen() -> None:
    assert FEW.options == MANY.options == {}
    assert Tiling(1, 16, warps=2, stages=5).options == {"num_warps": 2, "num_stages": 5}
    assert Tiling(1, 16, stages=5).options == {"num_stages": 5} and cases.label(Tiling(2, 16, stages=5)) == "16x2 s5"


def test_candidates_are_tiles_that_a_kernel_can_have() -> None:
    for candidates, few in zip(CANDIDATES, (True, False), strict=True):
        assert len({cases.label(tiling) for tiling in candidates}) == len(candidates) > 30
        for tiling in candidates:
            assert tiling.rows == FEW_ROWS if few else tiling.rows >= FEW_ROWS
            assert all(size & (size - 1) == 0 for size in (tiling.rows, tiling.blocks, tiling.warps))
    assert cases.tilings(FEW_ROWS) == OTHERS[True] and cases.tilings(FEW_ROWS + 1) == OTHERS[False]
    assert cases.default_tiling(FEW_ROWS) == FEW and cases.default_tiling(FEW_ROWS + 1) == MANY
