"""`hybrid plot`: every figure from what run and simulate write, in both formats, and one line for what is wrong."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from routing import random_trace
from typer.testing import CliRunner

from gpu_cache.reuse import measure_reuse
from gpu_cache.trace import make_trace
from hybrid.commands import plot, simulate
from hybrid.commands.plot_data import read_hits, read_results, read_times
from hybrid.files.traces import write_trace
from hybrid.lab.figures import STYLE, binned, hit_rate_figure
from hybrid.lab.kept_results import KeptResults

RATES = ("--pcie-gbps", "25", "--device-gbps", "1000", "--cpu-gbps", "100", "--expert-mb", "100")
HITS = """step,layer,calls,hits,loading,misses,evictions
0,0,2,0,0,2,0
0,1,2,1,0,1,0
1,0,2,2,0,0,0
1,1,2,0,1,1,0
"""
TIMES = """step,prompt_rows,attention,moe,head,other,sampling,total,cpu_experts,device_experts,copy,lookup
0,8,9,9,9,9,9,45,1,1,1,1
1,0,1,4,2,0.5,0.5,8,2,3,1,0.5
2,0,1,4,2,0.5,0.5,8,2,3,1,0.5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plots")
    write_trace(folder / "trace.csv", random_trace(1, steps=40, layers=4, experts=8, top_k=2, tokens=2))
    (folder / "hits.csv").write_text(HITS)
    (folder / "times.csv").write_text(TIMES)
    for form in ("csv", "json"):
        shapes = ["--nblocks", "2,4", "--nways", "2,4,8", "--policy", "all", "--output", form]
        result = CliRunner().invoke(simulate.app, ["--trace", str(folder / "trace.csv"), *shapes, *RATES])
        (folder / f"results.{form}").write_text(result.stdout)
    result = CliRunner().invoke(simulate.app, ["--trace", str(folder / "trace.csv"), "--curve", "--output", "csv"])
    (folder / "curves.csv").write_text(result.stdout)
    kept = ["--results", str(folder / "kept.jsonl"), "--nblocks", "2,4", "--nways", "2,4,8", "--policy", "LRU,Belady"]
    CliRunner().invoke(simulate.app, ["--trace", str(folder / "trace.csv"), *kept, *RATES])
    with open(folder / "kept.jsonl", "a") as file:
        file.write('{"name": "cut o')
    line = (folder / "kept.jsonl").read_text().splitlines()[0]
    trace = json.loads(line)["trace"]
    for name in ("two", "one-trace"):
        kept = KeptResults(folder / f"{name}.jsonl")
        entry = json.loads(line)
        kept.add("a", entry["result"], trace, "code")
        kept.add("b", entry["result"] | {"hits": 1}, "another" if name == "two" else trace, "newer code")
    (folder / "cut.jsonl").write_text(line[:50])
    return folder


FIGURES = [
    ("hit-rate", "results.csv", ["bypass-Belady (bound)", "expert slots", "S3-FIFO"]),
    ("hit-rate", "results.json", ["N = 2 indexes", "N = 4 indexes"]),
    ("hit-rate", "kept.jsonl", ["N = 2 indexes", "Belady"]),
    ("layers", "kept.jsonl", ["LRU", "MoE layer"]),
    ("speed", "kept.jsonl", ["16 slots", "tokens/s"]),
    ("speed", "results.csv", ["16 slots", "CPU alone", "tokens/s"]),
    ("layers", "results.json", ["static-layers", "MoE layer"]),
    ("layers", "hits.csv", ["MoE layer", "step"]),
    ("curve", "curves.csv", ["bypass-Belady", "expert slots", "Che"]),
    ("reuse", "trace.csv", ["chance", "distance d, tokens"]),
    (
        "breakdown",
        "times.csv",
        ["experts on the CPU  2 ms", "experts on the device  3 ms", "router and rest of MoE  1.5 ms"],
    ),
]


@pytest.mark.parametrize(("kind", "source", "words"), FIGURES, ids=lambda value: str(value)[:20])
def test_every_figure_is_drawn_in_both_formats(folder: Path, tmp_path: Path, kind: str, source: str, words) -> None:
    """As SVG twice, to the same bytes; the first of a kind as PNG and PDF too, of which matplotlib alone knows."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra [research]")
    first = source == next(other for same, other, _ in FIGURES if same == kind)
    suffixes = [".svg", ".again.svg", *([".png", ".pdf"] if first else [])]
    for suffix in suffixes:
        target = tmp_path / f"figure{suffix}"
        result = CliRunner().invoke(plot.app, [kind, str(folder / source), str(target), "--title", "A title"])
        assert (result.exit_code, result.stdout) == (0, ""), result.output
        assert ("--shape" in result.stderr) == (kind == "layers" and source != "hits.csv")
    assert not first or (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    drawing = (tmp_path / "figure.svg").read_text()
    assert all(word in drawing for word in ["A title", *words])
    assert drawing == (tmp_path / "figure.again.svg").read_text()
    assert not first or (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
    assert len(list(tmp_path.iterdir())) == len(suffixes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pie", "hits.csv", "f.png"], ["'pie'", "hit-rate, speed, layers, reuse, breakdown, curve"]),
        (["layers", "hits.csv", "f.gif"], [".png, .svg or .pdf"]),
        (["layers", "missing.csv", "f.png"], ["missing.csv", "no such file"]),
        (["layers", "hits.csv", "no/f.png"], ["no directory"]),
        (["hit-rate", "hits.csv", "f.png"], ["hybrid simulate", "--output csv, --output json or --results"]),
        (["layers", "two.jsonl", "f.png"], ["two.jsonl", "2 traces"]),
        (["hit-rate", "cut.jsonl", "f.png"], ["cut.jsonl", "--results"]),
        (["layers", "trace.csv", "f.png"], ["no column calls, hits"]),
        (["breakdown", "hits.csv", "f.png"], ["no column total"]),
        (["reuse", "hits.csv", "f.png"], ["no column sequence"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values_are_one_line_and_exit_code_2(folder: Path, monkeypatch, arguments: list[str], words) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(plot.app, arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and not list(folder.glob("f.*"))
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("cut", ["1,0,2\n", "1,0,two,0,0,0,0\n"])
def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path, cut: str) -> None:
    (tmp_path / "hits.csv").write_text(HITS + cut)
    result = CliRunner().invoke(plot.app, ["layers", str(tmp_path / "hits.csv"), str(tmp_path / "f.svg")])
    assert result.exit_code == 2 and "not whole" in result.stderr


def test_results_without_rates_have_no_speed(folder: Path, tmp_path: Path) -> None:
    arguments = ["--trace", str(folder / "trace.csv"), "--policy", "LRU", "--output", "csv"]
    (tmp_path / "r.csv").write_text(CliRunner().invoke(simulate.app, arguments).stdout)
    result = CliRunner().invoke(plot.app, ["speed", str(tmp_path / "r.csv"), str(tmp_path / "f.svg")])
    assert result.exit_code == 2 and "--pcie-gbps" in result.stderr


def test_one_shape_of_several_is_chosen_and_said(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra [research]")
    arguments = ["layers", str(folder / "results.json"), str(tmp_path / "f.svg")]
    result = CliRunner().invoke(plot.app, arguments)
    assert "drawn for 2x8 slots, the middle one of 2x2, 2x4, 4x2, 2x8, 4x4, 4x8" in result.stderr
    assert "2×8 slots" in (tmp_path / "f.svg").read_text()
    assert CliRunner().invoke(plot.app, [*arguments, "--shape", "4x2"]).stderr == ""
    assert "4×2 slots" in (tmp_path / "f.svg").read_text()
    wrong = CliRunner().invoke(plot.app, [*arguments, "--shape", "9x9"])
    assert wrong.exit_code == 2 and "it has 2x2, 2x4" in wrong.stderr


def test_the_title_names_model_and_trace(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra [research]")
    for source in ("results.json", "results.csv"):
        arguments = ["hit-rate", str(folder / source), str(tmp_path / "f.svg"), "--model", "A model"]
        CliRunner().invoke(plot.app, arguments)
        drawing = (tmp_path / "f.svg").read_text()
        assert "Hit rate of the expert cache" in drawing and "A model, trace.csv" in drawing


def test_results_of_newer_code_replace_the_older(folder: Path) -> None:
    source = folder / "one-trace.jsonl"
    (row,) = read_results(source, source.read_text()).rows
    assert row["hits"] == 1


def test_hits_are_shares_of_calls(folder: Path) -> None:
    shares, run = read_hits(folder / "hits.csv", HITS)
    assert run == 1 and shares.tolist() == [[0, 1], [0.5, 0]]


def test_times_add_up(folder: Path) -> None:
    parts, beside = read_times(folder / "times.csv", TIMES)
    assert sum(times[0] for times in parts.values()) == 8 and set(beside) == {"experts on the device", "copies"}


def test_columns_are_added_up_in_runs() -> None:
    sums, run = binned(np.arange(10.0).reshape(2, 5), maximum=2)
    assert run == 3 and sums.tolist() == [[3, 7], [18, 17]]


def test_reuse_counts_what_the_token_before_chose() -> None:
    """Two layers, top-2: tokens of sequence 0 choose {0,1}, {0,2}, {0,2} and then {3,1}, {0,1}, {0,1}."""
    sets = [[(0, 1), (3, 1)], [(0, 2), (0, 1)], [(0, 2), (0, 1)]]
    rows = [
        (token, 0, token, layer, rank, expert, 0.5)
        for token, layers in enumerate(sets)
        for layer, experts in enumerate(layers)
        for rank, expert in enumerate(experts)
    ]
    names = ("step", "sequence", "position", "layer", "rank", "expert", "score")
    trace = make_trace(dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True)))
    reuse = measure_reuse(trace)
    assert reuse.tokens.tolist() == [[0.75, 0.75], [0.5, 0.5]] and reuse.same_sets.tolist() == [0.5, 0.5]
    assert reuse.window.tolist() == [[0.75, 0.75], [1, 1]] and reuse.layers.tolist() == [0.5] and reuse.chance == 0.5


def test_a_trace_of_others_becomes_a_figure_at_once(tmp_path: Path) -> None:
    """Of the excerpt of a route.csv, by its replays."""
    route = Path(__file__).parent / "traces" / "others" / "bigmoeonedge.route.csv"
    result = CliRunner().invoke(plot.app, ["hit-rate", str(route), str(tmp_path / "f.svg")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "f.svg").read_text()
    assert "bigmoeonedge.route.csv" in text and "48 MoE layers of 128 experts" in text and "Belady" in text


def test_a_legend_of_many_lines_fits() -> None:
    same = {"admission": "always", "mapping": "layer", "quota": None, "delay": 0, "calls": 10}
    rows = [
        {"policy": f"policy-{number}", "nblocks": blocks, "nways": ways, "slots": blocks * ways, "hits": ways, **same}
        for number in range(40)
        for blocks, ways in ((2, 2), (2, 4), (4, 2))
    ]
    with rc_context(STYLE):
        figure = hit_rate_figure(rows, "many")
        figure.savefig(BytesIO(), format="png")
        legend = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].texts) == 40
    assert legend.y0 >= 0 and legend.y1 <= figure.bbox.y1
