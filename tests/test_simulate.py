"""`hybrid simulate`: every combination in three forms, resumable, and one line for what is wrong."""

from __future__ import annotations

import csv
import inspect
import json
import os
import statistics
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from routing import random_trace
from typer.testing import CliRunner

from gpu_cache import simulator
from gpu_cache.source import digest_of_modules
from gpu_cache.trace import COLUMNS
from hybrid.commands.simulate import app
from hybrid.files.traces import read_trace, write_trace

RATES = ("--pcie-gbps", "25", "--device-gbps", "1000", "--cpu-gbps", "100", "--expert-mb", "100")


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    write_trace(path, random_trace(1, steps=60, layers=4, experts=8, top_k=2))
    return path


def simulate(trace: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["--trace", str(trace), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


GRID = ("--nblocks", "2,4", "--nways", "2,4", "--policy", "lru,SIEVE,Belady", "--admission", "always,second-touch")


def test_a_table_says_what_was_copied_ahead_and_used(trace: Path) -> None:
    rules = ("--nblocks", "4", "--nways", "4", "--policy", "LRU,bypass-Belady", "--prefetch", "none,transition")
    lines = simulate(trace, *rules).splitlines()
    assert "| copied ahead a step | of them used |" in lines[2] and "prefetch" in lines[2]
    assert [line.split("|")[1:3] for line in lines[4:]] == [
        [" LRU           ", " none       "],
        [" LRU           ", " transition "],
        [" bypass-Belady ", " none       "],
    ]
    rows = list(csv.DictReader(simulate(trace, *rules, "--output", "csv").splitlines()))
    assert [int(row["prefetched"]) > int(row["prefetch_used"]) > 0 for row in rows] == [False, True, False]
    assert "copied ahead" not in simulate(trace, *rules[:-1], "none")


def test_json_has_a_result_for_every_combination(trace: Path) -> None:
    report = json.loads(simulate(trace, *GRID, "--quota", "none,3", "--workers", "1", "--output", "json"))
    found = [
        tuple(row[name] for name in ("nblocks", "nways", "policy", "admission", "quota")) for row in report["results"]
    ]
    wanted = {
        (n, m, policy, admission, quota)
        for n in (2, 4)
        for m in (2, 4)
        for quota in (None, 3)
        for policy, admission in [(p, a) for p in ("LRU", "SIEVE") for a in ("always", "second-touch")]
        + [("Belady", "always")]
    }
    assert len(found) == len(set(found)) and set(found) == wanted
    assert all(row["calls"] == row["hits"] + row["loading"] + row["misses"] == 480 for row in report["results"])
    assert report["provenance"]["trace"]["calls"] == 480 and report["cost_model"] is None


def test_csv_and_table_say_the_same(trace: Path) -> None:
    grid = ("--policy", "LRU,bypass-Belady,static-layers", *RATES)
    rows = list(csv.DictReader(simulate(trace, *grid, "--output", "csv").splitlines()))
    assert [(row["nblocks"], row["nways"], row["policy"]) for row in rows[:3]] == [
        ("4", "2", "LRU"),
        ("4", "2", "bypass-Belady"),
        ("4", "2", "static-layers"),
    ]
    lines = simulate(trace, *grid).splitlines()
    assert "480 calls of 4 layers x 8 experts in 60 steps" in lines[0]
    for row, line in zip(rows, lines[4:], strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [row["nways"], row["policy"]]
        assert cells[2] == f"{int(row['hits']) / int(row['calls']):.1%}"
        assert float(cells[-3]) == pytest.approx(float(row["tokens_per_second"]), abs=0.01)
        low, high = (float(row[f"hit_rate_{end}"]) for end in ("low", "high"))
        assert low <= float(row["hit_rate"]) <= high and cells[-2] == f"{100 * low:.1f} to {100 * high:.1f}"
        assert bool(cells[-1]) == (row["policy"] != "LRU")
    assert lines[-1].startswith("with every expert on the CPU: 125.00 tokens/s")


def test_results_are_kept_and_not_replayed_again(trace: Path, tmp_path: Path, monkeypatch) -> None:
    kept = ("--results", str(tmp_path / "results.jsonl"))
    first = simulate(trace, *GRID, *kept, "--output", "csv")
    monkeypatch.setattr("gpu_cache.sweep.replay", pytest.fail)
    assert simulate(trace, *GRID, *kept, "--output", "csv") == first


def edited(getsource: Callable[[ModuleType], str], name: str, module: ModuleType) -> str:
    """The source of modules, where one has been edited."""
    return getsource(module) + "# edited" * (module.__name__ == name)


def test_results_of_other_code_are_not_taken(trace: Path, tmp_path: Path, monkeypatch) -> None:
    """A policy's own source, what it is made of, and the simulator's."""
    kept = ("--results", str(tmp_path / "results.jsonl"), "--policy", "FIFO,LFU", "--nways", "2", "--workers", "1")
    replayed: list[str] = []

    def replay(calls, setting, costs):
        replayed.append(setting.policy)
        return simulator.replay(calls, setting, costs)

    monkeypatch.setattr("gpu_cache.sweep.replay", replay)
    for changed, again in (
        ("", ["FIFO", "LFU"]),
        ("", []),
        ("gpu_cache.policies.fifo", ["FIFO"]),
        ("gpu_cache.policies.decayed", ["LFU"]),
        ("gpu_cache.policies.sieve", []),
        ("gpu_cache.table", ["FIFO", "LFU"]),
        ("gpu_cache.policies.base", ["FIFO", "LFU"]),
    ):
        digest_of_modules.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(inspect, "getsource", partial(edited, inspect.getsource, changed))
            simulate(trace, *kept)
        assert sorted(replayed) == again, changed
        replayed.clear()
    digest_of_modules.cache_clear()


def test_results_of_a_changed_file_are_not_taken(trace: Path, tmp_path: Path) -> None:
    """A user's rule beside its policy: a constant of either is another result."""
    policy = "from gpu_cache.policies.lru import Lru\nclass P(Lru):\n    kind = {}\n"
    rule = "from gpu_cache.admission import Admission\nclass R(Admission):\n    kind = {}\n"
    files = (tmp_path / "policy.py", tmp_path / "rule.py")
    results = tmp_path / "results.jsonl"
    kept = ("--results", str(results), "--nways", "2", "--workers", "1")
    lines = []
    for first, second in ((0, 0), (0, 0), (1, 0), (1, 1), (0, 1), (0, 0)):
        files[0].write_text(policy.format(first))
        files[1].write_text(rule.format(second))
        simulate(trace, *kept, "--policy", f"{files[0]}", "--admission", f"{files[1]}:R")
        lines.append(results.read_text().count("\n"))
    assert lines == [1, 1, 2, 3, 4, 4]


def test_results_that_were_changed_or_cut_off_are_replayed_again(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    kept = ("--results", str(path), "--policy", "LRU,LFU", "--nways", "2", "--output", "csv", "--workers", "1")
    first = simulate(trace, *kept)
    one, two = path.read_text().splitlines()
    path.write_text(one.replace('"admission": "always", ', "") + "\n" + "[" * 100_000 + "\n" + two[:-30])
    assert simulate(trace, *kept) == first and path.read_text().count("\n") == 5
    assert simulate(trace, *kept) == first and path.read_text().count("\n") == 5


def test_a_file_that_holds_no_results_is_kept(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes"
    for text in ("dear diary\n", "{}\n", "[" * 100_000):
        path.write_text(text)
        result = CliRunner().invoke(app, ["--trace", str(trace), "--results", str(path)])
        assert result.exit_code == 2 and "something else" in result.stderr and path.read_text() == text
    for place in (tmp_path, Path("/dev/zero")):
        result = CliRunner().invoke(app, ["--trace", str(trace), "--results", str(place)])
        assert result.exit_code == 2 and "no regular file" in result.stderr


def test_several_traces_are_all_replayed(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    write_trace(other, random_trace(2, steps=30, layers=4, experts=8, top_k=2))
    grid = ("--policy", "LRU,bypass-Belady", "--nways", "2,4", *RATES)
    alone = [json.loads(simulate(path, *grid, "--output", "json"))["results"] for path in (trace, other)]
    both = json.loads(simulate(trace, "--trace", str(other), *grid, "--output", "json"))
    assert both["replays"] == [*alone[0], *alone[1]] and len(both["provenance"]["traces"]) == 2
    for mean, first, second in zip(both["results"], *alone, strict=True):
        rates = [first["hit_rate"], second["hit_rate"]]
        assert mean["hit_rate"] == pytest.approx(sum(rates) / 2, abs=1e-6)
        assert mean["hit_rate_stdev"] == pytest.approx(statistics.stdev(rates), abs=1e-6)
        assert mean["traces"] == 2 and mean["hits"] == first["hits"] + second["hits"]
    table = simulate(trace, "--trace", str(other), *grid)
    first, second = (row["hit_rate"] * 100 for row in (alone[0][0], alone[1][0]))
    assert "2 traces, mean ± standard deviation: 720 calls" in table
    assert f"{(first + second) / 2:.1f}% ± {statistics.stdev([first, second]):.1f}" in table
    rows = list(csv.DictReader(simulate(trace, "--trace", str(other), *grid, "--output", "csv").splitlines()))
    assert [row["trace"] for row in rows].count("") == 4 and len(rows) == 12
    assert simulate(trace, "--trace", str(trace), *grid) == simulate(trace, *grid)


def test_traces_of_different_models_are_not_averaged(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    write_trace(other, random_trace(2, steps=30, layers=3, experts=8, top_k=2))
    result = CliRunner().invoke(app, ["--trace", str(trace), "--trace", str(other)])
    assert result.exit_code == 2 and "4, 3 layers" in result.stderr and "--layers 4" in result.stderr
    both = ("--trace", str(other), "--layers", "4", "--policy", "LRU")
    assert "2 traces" in simulate(trace, *both)
    result = CliRunner().invoke(app, ["--trace", str(trace), *both[:4], "--convert", str(tmp_path / "c.csv")])
    assert result.exit_code == 2 and "one --trace" in result.stderr
    assert CliRunner().invoke(app, []).exit_code == 2


def test_prefetches_learn_from_the_first_steps_or_from_another_trace(trace: Path, tmp_path: Path) -> None:
    caches = ("--nblocks", "4", "--nways", "4", "--policy", "LRU", "--prefetch", "none,transition", "--output", "json")
    whole, parts = read_trace(trace, None, None, "--trace"), []
    for name, chosen in (("first", whole.step < 15), ("others", whole.step >= 15)):
        parts.append(tmp_path / f"{name}.csv")
        columns = {column: getattr(whole, column)[chosen] for column in COLUMNS}
        write_trace(parts[-1], replace(whole, **columns))
    split = json.loads(simulate(trace, *caches, "--train-fraction", "0.25"))
    apart = json.loads(simulate(parts[1], *caches, "--train", str(parts[0])))
    alone = json.loads(simulate(parts[1], *caches))
    for row in (*split["results"], *apart["results"], *alone["results"]):
        del row["trace"]
    assert split["results"] == apart["results"] != alone["results"]
    assert split["provenance"]["trace"]["teacher"]["steps"] == 15


def test_a_trace_may_come_from_a_pipe(trace: Path) -> None:
    out, into = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(into, trace.read_bytes()), os.close(into)))
    writer.start()
    grid = ("--policy", "LRU", "--nways", "2", "--output", "csv")
    fields = [line.split(",")[1:] for path in (trace, f"/dev/fd/{out}") for line in simulate(path, *grid).splitlines()]
    writer.join()
    assert fields[:2] == fields[2:]
    os.close(out)


def test_a_trace_is_converted(trace: Path, tmp_path: Path) -> None:
    copy, choices = tmp_path / "copy.csv", tmp_path / "expert_choices.csv"
    assert simulate(trace, "--convert", str(copy), "--libcachesim", str(tmp_path / "other.csv")) == ""
    assert copy.read_text() == trace.read_text()
    assert (tmp_path / "other.csv").read_text().count("\n") == 481
    choices.write_text("Index,Block_0,Block_0,Block_1,Block_1\n0,1,2,0,3\n1,1,2,0,3\n")
    assert (
        json.loads(simulate(choices, "--nways", "2", "--policy", "LRU", "--output", "json"))["results"][0]["hits"] == 4
    )
    simulate(choices, "--convert", str(copy))
    assert len(read_trace(copy)) == 8


def test_a_profile_gives_the_bandwidth_of_the_cpu(trace: Path, tmp_path: Path) -> None:
    profile = tmp_path / "bench.json"
    profile.write_text(json.dumps({"machine": {"read_gbps": 50.0}}))
    rates = [*RATES[:4], *RATES[6:], "--profile", str(profile), "--policy", "LRU", "--output", "json"]
    report = json.loads(simulate(trace, *rates))
    assert report["cost_model"]["cpu_gbps"] == 50 and report["results"][0]["cpu_tokens_per_second"] == 62.5


def test_a_trace_that_names_early_in_part_is_warned_of(tmp_path: Path) -> None:
    whole, path = random_trace(1, steps=8, layers=4, experts=8, top_k=2), tmp_path / "part.csv"
    arguments = ["--trace", str(path), "--nways", "4", "--policy", "LRU", "--prefetch", "none,next-gate"]
    for steps, text in ((2, "for 25.0% of the calls before the last layer"), (8, None)):
        write_trace(path, replace(whole, next_expert=np.where(whole.step < steps, whole.expert, -1)))
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and (f"{path} holds what routers" in result.stderr) == (text is not None)
        assert text is None or text in result.stderr
    assert "early" not in CliRunner().invoke(app, [*arguments[:-1], "none"]).stderr


def test_few_ways_are_warned_of(trace: Path) -> None:
    result = CliRunner().invoke(app, ["--trace", str(trace), "--nways", "1,2", "--policy", "LRU"])
    assert result.exit_code == 0 and "up to 2 experts" in result.stderr and "index of 1 ways" in result.stderr
    assert CliRunner().invoke(app, ["--trace", str(trace), "--nways", "2", "--policy", "LRU"]).stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nblocks", "0"], ["0"]),
        (["--nblocks", "-3"], ["-3"]),
        (["--nways", "4;8"], ["--nways", "'4;8'"]),
        (["--nblocks", "4", "--nways", "9"], ["36 slots", "32 experts"]),
        (["--policy", "MRU"], ["'MRU'", "LRU", "SIEVE", "bypass-Belady"]),
        (["--policy", "LRU,,LFU"], ["--policy"]),
        (["--admission", "never"], ["'never'", "second-touch"]),
        (["--admission", "break-even"], ["costs"]),
        (["--mapping", "random"], ["'random'", "modulo"]),
        (["--quota", "-1"], ["-1"]),
        (["--copy-delay", "-1"], ["-1"]),
        (["--workers", "0"], ["--workers"]),
        (["--output", "xml"], ["xml", "table, csv, json"]),
        (["--cpu-gbps", "50"], ["--pcie-gbps, --device-gbps, --expert-mb"]),
        ([*RATES[:7], "0"], ["expert bytes"]),
        (["--experts", "4"], ["unknown expert"]),
        (["--layers", "3"], ["unknown layer 3", "0 to 2"]),
        (["--experts", "0"], ["--experts", "0", "1"]),
        (["--experts", str(1 << 63)], [str(1 << 63), "8192"]),
        (["--layers", "-5"], ["--layers", "-5"]),
        (["--results", "/missing/results"], ["--results", "/missing"]),
        (["--convert", "trace.txt"], [".csv or .parquet"]),
        (["--convert", "copy.csv", "--train", "other.csv"], ["--convert writes", "drop it, or --train"]),
        (["--libcachesim", "c.csv", "--nways", "2", "--policy", "LRU"], ["--libcachesim", "or --policy, --nways"]),
        (["--train-fraction", "1"], ["the first 1 of 60 steps", "below 1"]),
        (["--train-fraction", "0.5", "--train", "other.csv"], ["--train and --train-fraction", "one of them"]),
        (["--train", "/missing/trace.csv"], ["--train", "/missing/trace.csv"]),
        (["--curve", "--train-fraction", "0.5"], ["--train-fraction", "--curve"]),
        (["--profile", "/missing/bench.json", *RATES[:4], *RATES[6:]], ["--profile", "/missing"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values_are_one_line_and_exit_code_2(trace: Path, arguments: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(app, ["--trace", str(trace), *arguments])
    assert result.exit_code == 2 and result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), result.stderr


def test_a_trace_that_is_wrong_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    for text, word in ((",".join(COLUMNS), "no rows"), ("a,b\n1,2\n", "no column"), (None, "no such file")):
        path.unlink(missing_ok=True) if text is None else path.write_text(text)
        result = CliRunner().invoke(app, ["--trace", str(path)])
        assert result.exit_code == 2 and word in result.stderr and result.stderr.count("\n") == 1


CURVES = ("--curve", "--nblocks", "2,4", "--mapping", "modulo,prefix")


def test_a_curve_has_what_replays_of_every_size_hit(trace: Path) -> None:
    rows = list(csv.DictReader(simulate(trace, *CURVES, "--policy", "lru,Belady", "--output", "csv").splitlines()))
    sizes = ("--nblocks", "2,4", "--mapping", "modulo,prefix", "--nways", "1,3,8", "--policy", "LRU,Belady")
    names = ("policy", "nblocks", "mapping", "nways", "slots", "calls", "hits")
    replays = csv.DictReader(simulate(trace, *sizes, "--workers", "1", "--output", "csv").splitlines())
    found = [tuple(row[name] for name in names) for row in rows]
    assert len(found) == len(set(found)) == 2 * 2 * (16 + 8)
    assert {tuple(row[name] for name in names) for row in replays} <= set(found)
    lines = simulate(trace, *CURVES).splitlines()
    assert lines[2].split() == [
        "|",
        "nblocks",
        "|",
        "mapping",
        "|",
        "nways",
        "|",
        "slots",
        "|",
        "LRU",
        "|",
        "Belady",
        "|",
        "bypass-Belady",
        "|",
        "static-best",
        "|",
        "Che",
        "|",
    ]
    assert len(lines) == 4 + 2 * (16 + 8)
    assert (
        simulate(trace, "--curve", "--nblocks", "1", "--layers", "8")
        .strip()
        .endswith("33 of 64 sizes; --output csv has all")
    )


def test_curves_of_several_traces_are_means(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    write_trace(other, random_trace(2, steps=30, layers=4, experts=8, top_k=2))
    report = json.loads(simulate(trace, "--trace", str(other), *CURVES, "--policy", "LRU", "--output", "json"))
    assert len(report["replays"]) == 2 * len(report["results"])
    pairs = zip(report["replays"], report["replays"][len(report["results"]) :], strict=False)
    for row, (one, two) in zip(report["results"], pairs, strict=False):
        assert row["hits"] == one["hits"] + two["hits"] and row["traces"] == 2
        assert row["hit_rate"] == pytest.approx((one["hit_rate"] + two["hit_rate"]) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--quota", "4", "--copy-delay", "1"), "without a limit: drop --quota, --copy-delay, or drop --curve"),
        (("--admission", "second-touch", "--prefetch", "frequency"), "drop --admission, --prefetch, or"),
        (("--nways", "4", "--pcie-gbps", "9"), "drop --nways, --pcie-gbps, or"),
        (("--policy", "LRU,lfu,Sieve"), "cannot be had of LFU, SIEVE: one pass gives"),
        (("--policy", "nothing"), "'nothing' is unknown"),
        (("--nblocks", "0"), "indexes (nblocks) of the cache: 0"),
    ],
)
def test_what_a_curve_cannot_have_is_refused_in_a_line(trace: Path, arguments: tuple[str, ...], text: str) -> None:
    result = CliRunner().invoke(app, ["--trace", str(trace), "--curve", *arguments])
    assert result.exit_code == 2 and text in result.output and result.output.count("\n") == 1


def test_all_with_a_curve_names_those_that_have_none(trace: Path) -> None:
    result = CliRunner().invoke(app, ["--trace", str(trace), "--curve", "--policy", "all"])
    assert result.exit_code == 0 and "note: no curve from one pass" in result.stderr and "LFU" in result.stderr
