"""Experiments as files: what is replayed, what is kept, what a report says, and one line for what is wrong."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from routing import random_trace
from typer.testing import CliRunner

from gpu_cache import template_prefetch
from gpu_cache.costs import Machine, predict, work_of
from gpu_cache.coverage import coverage
from gpu_cache.simulator import Setting, replay
from gpu_cache.teaching import taught_by_first
from gpu_cache.trace import calls
from hybrid import lab
from hybrid.commands.experiment import app
from hybrid.errors import ConfigError
from hybrid.files.traces import write_trace
from hybrid.lab.claims import OF_CACHES, OF_TRACES, Finding
from hybrid.lab.grid import ways_of
from hybrid.lab.parts import FIGURES, Claim
from hybrid.lab.verdict import Verdict

pytest.importorskip("matplotlib")

TRACES = [random_trace(seed, steps=60, layers=4, experts=8, top_k=2) for seed in (1, 2)]
TEXT = """
title = "Two <policies>"
about = "First.\\n\\nSecond."

[[models]]
name = "made up"
traces = ["a.csv", "b.csv"]
expert_mb = 100

[[caches]]
nways = [2, 0.5]
policies = ["lru", "random"]
seeds = [0, 1]

[[caches]]
nblocks = [2]
nways = [8]
policies = ["FIFO"]
admissions = ["break-even"]
copy_delay = [1]

[[machines]]
name = "desktop"
pcie_gbps = 25
device_gbps = 1000
cpu_gbps = 50

[[machines]]
name = "server"
pcie_gbps = 25
device_gbps = 1000
cpu_gbps = 500.0
"""
MACHINE = Machine(25, 1000, 50, 100e6)


def written(folder: Path) -> Path:
    for name, trace in zip("ab", TRACES, strict=True):
        write_trace(folder / f"{name}.csv", trace)
    path = folder / "two.toml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """An experiment that was run; not to be changed."""
    path = written(tmp_path_factory.mktemp("ran"))
    lab.run(lab.load(path))
    return path


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def row_of(file: Path, **wanted: object) -> dict:
    rows = [row for row in lab.table(lab.load(file)) if wanted.items() <= row.items()]
    assert len(rows) == 1, rows
    return rows[0]


def test_results_are_those_of_the_simulator(ran: Path) -> None:
    """Over both traces, the mean of the seeds; the bound and the best fixed experts stand beside each cache."""
    for policy, seeds in (("LRU", (0, 1)), ("random", (0, 1)), ("bypass-Belady", (0,)), ("static-best", (0,))):
        results = [[replay(calls(trace), Setting(4, 2, policy, seed=seed)) for trace in TRACES] for seed in seeds]
        row = row_of(ran, nblocks=4, nways=2, policy=policy)
        hits = sum(int(one.hits.sum()) for both in results for one in both) / len(seeds)
        assert row["hits"] == round(hits) and row["calls"] == 960 and row["seeds"] == len(seeds)
        assert row["hit_rate"] == pytest.approx(hits / 960, abs=1e-6)
        assert row["hit_rate_low"] <= row["hit_rate"] <= row["hit_rate_high"]
        if policy == "bypass-Belady":
            bound, lru = hits, row_of(ran, nblocks=4, nways=2, policy="LRU")
            assert row["regret"] == 0 and lru["regret"] == pytest.approx((bound - lru["hits"]) / 960, abs=1e-6)
    assert {row["nways"] for row in lab.table(lab.load(ran)) if row["nblocks"] == 4} == {2, 4}  # half of 8 experts


def test_prefetch_is_replayed_and_has_a_bound_of_its_own(file: Path) -> None:
    caches = '[[caches]]\nnways = [2]\npolicies = ["LRU", "Belady"]\n'
    caches += 'prefetch = ["none", "Transition", "perfect:2", "own.py:3"]'
    file.write_text(TEXT.split("[[caches]]")[0] + caches)
    own = file.parent / "own.py"  # found from the folder of the experiment
    own.write_text(Path(template_prefetch.__file__).read_text())
    experiment = lab.load(file)
    lab.run(experiment)
    found = {one.name: one for one in lab.outcomes(experiment)}
    rules = ("transition", "perfect:2", f"{own}:3")
    assert list(found)[:5] == ["LRU", *(f"LRU, {rule} prefetch" for rule in rules), "Belady"] and len(found) == 7
    for ahead in rules:
        results = [replay(calls(trace), Setting(4, 2, prefetch=ahead)) for trace in TRACES]
        one = found[f"LRU, {ahead} prefetch"]
        assert one.mean("hits") == sum(int(result.hits.sum()) for result in results)
        assert one.bound == sum(result.upper_bound or 0 for result in results) and one.bound > found["LRU"].bound
    assert [one.causal for one in found.values()][:5] == [True, True, False, True, False]


def test_speeds_are_those_of_the_cost_model(ran: Path) -> None:
    """A machine changes nothing that is replayed, except where admission reckons with it."""
    row = row_of(ran, nblocks=2, policy="FIFO", machine="desktop")
    results = [replay(calls(trace), Setting(2, 8, "FIFO", "break-even", delay=1), MACHINE.costs) for trace in TRACES]
    seconds = sum(predict(work_of(one), MACHINE).layers * one.steps for one in results) / 120
    copies = sum(predict(work_of(one), MACHINE).copy * one.steps for one in results) / 120
    assert row["tokens_per_second, desktop"] == pytest.approx(1 / max(seconds, copies), abs=1e-3)
    assert row["tokens_per_second, server"] is None and row["copied_mb_per_step"] == pytest.approx(
        100 * sum(int(one.fills.sum()) for one in results) / 120, abs=1e-3
    )
    assert row_of(ran, nblocks=4, nways=2, policy="LRU")["cpu_tokens_per_second, desktop"] == pytest.approx(1 / 16e-3)


def test_what_is_there_is_not_replayed_again(file: Path, monkeypatch) -> None:
    """After an interruption, a cut line, a new policy, or other rates: only what is new."""
    replayed: list[str] = []

    def counted(calls, setting, costs):
        replayed.append(setting.policy)
        if len(replayed) == limit:
            raise KeyboardInterrupt
        return replay(calls, setting, costs)

    monkeypatch.setattr("gpu_cache.sweep.replay", counted)
    limit, total = 7, 32
    with pytest.raises(KeyboardInterrupt):
        lab.run(lab.load(file))
    assert [(one.done, one.total) for one in lab.status(lab.load(file))] == [(6, 16), (0, 16)]
    with pytest.raises(ConfigError, match=f"26 of {total} replays are not there"):
        lab.outcomes(lab.load(file))
    limit = 0
    first = lab.run(lab.load(file))
    assert len(first) == total and len(replayed) == 7 + 26
    again = lab.run(lab.load(file))
    assert again == first and len(replayed) == 33
    kept = file.with_suffix("") / "results.jsonl"
    kept.write_bytes(kept.read_bytes()[:-40])
    assert lab.run(lab.load(file)) == first and len(replayed) == 34
    file.write_text(TEXT.replace('"lru"', '"SIEVE", "lru"').replace("pcie_gbps = 25", "pcie_gbps = 12", 1))
    lab.run(lab.load(file))
    assert sorted(replayed[34:]) == ["FIFO"] * 2 + ["SIEVE"] * 8


def test_a_report_is_one_page_with_its_files_beside_it(ran: Path) -> None:
    experiment = lab.load(ran)
    assert re.search(r"made up, b\.csv \| +16 \| +16 \|", invoke("status", ran))
    path = Path(invoke("report", ran).strip())
    text = path.read_text()
    assert "Two &lt;policies&gt;" in text and "<p>Second.</p>" in text
    assert not re.findall(r'(?:src|href)="(?!#)', text)  # nothing of another file
    rows = list(csv.DictReader((path.parent / "results.csv").open()))
    assert [row["policy"] for row in rows[:2]] == ["LRU", "random"]
    for row in rows:
        assert f"<td>{100 * float(row['hit_rate']):.1f}</td>" in text
    assert text.count("<svg") == 1 and (path.parent / "made-up-hits.svg").read_text().count("<svg") == 1
    about = json.loads((path.parent / "provenance.json").read_text())
    assert about["replays"] == 32 and len(about["traces"]) == 2 and about["traces"][0]["sha256"] in text
    first = path.read_bytes()
    assert lab.report(experiment).read_bytes() == first


def test_a_report_of_what_is_missing_is_refused(file: Path) -> None:
    for wanted in (lab.report, lab.outcomes, lab.table):
        with pytest.raises(ConfigError, match=r"32 of 32 replays are not there.*hybrid experiment run .*two\.toml"):
            wanted(lab.load(file))
    assert not file.with_suffix("").exists()


def test_the_verdict_weighs_the_cpu_and_experts_that_never_move() -> None:
    one = Verdict("m", "desktop", 8, cpu=10.0, fixed=8.0, cache=10.4, best="LRU")
    assert not one.pays and one.text == "neither pays: the CPU alone is as fast"
    assert replace(one, cache=10.6).text == "a cache pays"
    assert replace(one, fixed=12.0, cache=12.1).text == "fixed experts do as well as a cache"
    assert replace(one, fixed=12.0, cache=11.0).text == "fixed experts do better than a cache"
    assert replace(one, fixed=10.4, cache=10.9).text == "fixed experts do as well as a cache"


def test_a_bound_is_of_one_seed_of_every_trace(file: Path) -> None:
    write_trace(file.parent / "b.csv", long := random_trace(2, steps=200, layers=4, experts=8, top_k=2))
    caches = '[[caches]]\nnways = [2]\npolicies = ["LRU"]\nprefetch = ["transition"]\nseeds = [0, 1]'
    file.write_text(TEXT.split("[[caches]]")[0] + caches)
    lab.run(experiment := lab.load(file))
    found = {one.name: one for one in lab.outcomes(experiment)}["LRU, transition prefetch"]
    results = [replay(calls(trace), Setting(4, 2, prefetch="transition")) for trace in (TRACES[0], long)]
    assert found.bound == sum(result.upper_bound or 0 for result in results) and found.regret >= 0


def test_prefetches_learn_from_the_first_steps(file: Path) -> None:
    caches = '[[caches]]\nnways = [2]\npolicies = ["LRU"]\nprefetch = ["none", "transition"]\n'
    file.write_text(TEXT.split("[[caches]]")[0].replace("expert_mb = 100", "train_fraction = 0.25") + caches)
    lab.run(experiment := lab.load(file))
    found = {one.name: one for one in lab.outcomes(experiment)}
    for name, prefetch in (("LRU", "none"), ("LRU, transition prefetch", "transition")):
        setting = Setting(4, 2, prefetch=prefetch)
        results = [replay(taught_by_first(calls(trace), 0.25), setting) for trace in TRACES]
        assert [row["steps"] for row in found[name].rows] == [45, 45]
        assert [row["hits"] for row in found[name].rows] == [int(result.hits.sum()) for result in results]


@pytest.mark.parametrize(("share", "ways"), [(0.15, 9), (0.3, 18), (0.35, 21), (0.6, 36), (0.7, 42), (0.95, 57)])
def test_shares_of_experts_are_exact(share: float, ways: int) -> None:
    assert ways_of(share, 24, calls(random_trace(1, steps=1, layers=24, experts=60))) == ways


ALIKE = "".join(f'[[models]]\nname = "{name}"\ntraces = ["a.csv"]\n' for name in ("t w-o", "t/w-o"))
WRONG = [
    (
        "title",
        "titel",
        "two.toml has no key 'titel'; allowed: title, about, [[models]], [[caches]], [[machines]], [[claims]]",
    ),
    ("seeds", "seed", "two.toml: [[caches]] 1 has no key 'seed'; allowed: nways, policies"),
    ("expert_mb", "expert_gb", "two.toml: [[models]] 1 has no key 'expert_gb'; allowed: name"),
    ("pcie_gbps = 25", "pcie_gbps = true", "two.toml: [[machines]] 1, pcie_gbps has True; it must be a number"),
    ("pcie_gbps = 25\n", "", "two.toml: [[machines]] 1 needs the key 'pcie_gbps', a number"),
    ("pcie_gbps = 25", "pcie_gbps = 0", "two.toml: [[machines]] desktop, [[models]] made up: pcie gbps 0.0 is out of"),
    ('"server"', '"desktop"', "two.toml: [[machines]] has the name 'desktop' twice"),
    ('"lru"', '"lur"', "two.toml: [[caches]] 1, policies: replacement policy 'lur' is unknown: use one of"),
    ('["lru", "random"]', "[]", "two.toml: [[caches]] 1, policies is empty"),
    ('["lru", "random"]', '"lru"', "two.toml: [[caches]] 1, policies is 'lru'; it must be an array"),
    ('"break-even"', '"never"', "two.toml: [[caches]] 2, admissions: admission 'never' is unknown"),
    ("seeds = [0, 1]", 'prefetch = ["next-gate"]', "two.toml: [[caches]] 1, made up: prefetch next-gate cannot be"),
    ("[2, 0.5]", "[9, 0.5]", "two.toml: [[caches]] 1, made up: 4 indexes x 9 ways are 36 slots, the model has 32"),
    ("[2, 0.5]", "[1.5]", "two.toml: [[caches]] 1, made up: nways has the share 1.5; it must be above 0"),
    ("[2, 0.5]", "[0]", "two.toml: [[caches]] 1, made up: ways (nways) of the cache: 0, must be 1 to"),
    ("[2, 0.5]", "[nan]", "two.toml: [[caches]] 1, made up: nways has the share nan"),
    ("nblocks = [2]", 'nblocks = ["layer"]', "two.toml: [[caches]] 2, nblocks has 'layer'; allowed: a whole number or"),
    ("copy_delay = [1]", "quota = [-3]", "two.toml: [[caches]] 2, made up: quota of copies in a step: -3"),
    ("nblocks = [2]", 'models = ["made"]', "two.toml: [[caches]] 2, models has 'made'; allowed: made up"),
    ('"b.csv"', '"c.csv"', "two.toml: [[models]] made up, traces:"),
    ('["a.csv", "b.csv"]', "[]", "two.toml: [[models]] 1, traces is empty"),
    ("[[caches]]", "[[caches]", "two.toml: is no TOML ("),
    ("[[caches]]\nnways", "[caches]\nnways", "two.toml: is no TOML ("),
    (TEXT, "title = 1", "two.toml, title has 1; it must be a text"),
    (TEXT, "models = 1", "two.toml: [[models]] is no array of tables"),
    (TEXT, "models = [1]", "two.toml: [[models]] 1 is 1; it must be a table"),
    (TEXT, "", "two.toml has no [[models]]; give at least one"),
    ("expert_mb = 100", "", "break-even admission needs costs"),
    (
        "expert_mb = 100",
        "train_fraction = 1.5",
        "two.toml: [[models]] made up, train_fraction: the first 1.5 of 60 steps",
    ),
    (
        "[[caches]]",
        ALIKE + "[[caches]]",
        "two.toml: [[models]] 't w-o' and 't/w-o' would have the same files; rename one",
    ),
]


@pytest.mark.parametrize(("was", "given", "line"), WRONG, ids=[line[10:60] for _, _, line in WRONG])
def test_what_is_wrong_is_one_line_with_its_key(file: Path, was: str, given: str, line: str) -> None:
    assert was in TEXT
    file.write_text(TEXT.replace(was, given, 1))
    for command in ("run", "status", "report"):
        result = CliRunner().invoke(app, [command, str(file)])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
        assert line in result.stderr, result.stderr
    assert not file.with_suffix("").exists()


def test_a_policy_of_ones_own_is_found_from_the_file(file: Path) -> None:
    (file.parent / "mine.py").write_text("from gpu_cache.policies.lru import Lru\nclass Mine(Lru):\n    pass\n")
    file.write_text(TEXT.split("[[caches]]")[0] + '[[caches]]\nnways = [2]\npolicies = ["LRU", "mine.py:Mine"]')
    lab.run(lab.load(file))
    mine = row_of(file, policy=str(file.parent / "mine.py:Mine"))
    assert mine["hits"] == row_of(file, policy="LRU")["hits"]


def test_a_new_experiment_runs(file: Path) -> None:
    path = file.parent / "new.toml"
    invoke("new", path)
    assert "hybrid experiment run" in path.read_text()
    write_trace(file.parent / "trace.csv", random_trace(3, steps=30, layers=4, experts=8, top_k=2))
    invoke("run", path, "--workers", 1, "--folder", file.parent / "there")
    assert (file.parent / "there" / "results.jsonl").exists()
    assert CliRunner().invoke(app, ["new", str(path)]).exit_code == 2


CLAIMS = """
[[claims]]
says = "LRU is 5 to 15 points above random"
source = "a paper"
figure = "points"
policy = "lru"
beside = "RANDOM"
seeds = [0, 1]
nways = [2, 0.5]
published = [5]
to = 15

[[claims]]
says = "hits"
source = "a curve"
figure = "hits"
policy = "belady"
nblocks = 1
nways = [5, 12]
published = [{five}, 0.0]
tolerance = 0.001
explained = "Of another model."

[[claims]]
says = "half of the calls are of a quarter of the experts"
source = "an issue"
figure = "covered"
share = 0.25
published = [50]
"""


def test_claims_stand_beside_what_is_found(file: Path) -> None:
    """What they need is replayed without being asked for."""
    single = [replay(calls(trace), Setting(1, 5, "Belady")) for trace in TRACES]
    five = 100 * sum(int(one.hits.sum()) for one in single) / 960
    file.write_text(TEXT.split("[[caches]]")[0] + CLAIMS.format(five=round(five, 3)))
    experiment = lab.load(file)
    lab.run(experiment)
    found = lab.claims(experiment)
    assert [(one.place, one.published) for one in found[:2]] == [("4 x 2", "5 to 15"), ("4 x 4", "5 to 15")]
    rates = {(row["policy"], row["nways"]): row["hit_rate"] for row in lab.table(experiment) if row["nblocks"] == 4}
    assert found[0].ours == pytest.approx(100 * (rates["LRU", 2] - rates["random", 2]), abs=1e-3)
    assert found[0].range[0] <= found[0].ours <= found[0].range[1]
    assert [one.holds for one in found[2:4]] == ["yes", "no"]
    assert found[4].ours == pytest.approx(50 * sum(coverage(calls(trace), 0.25) for trace in TRACES))
    text = lab.report(experiment).read_text()
    rows = list(csv.DictReader((file.with_suffix("") / "claims.csv").open()))
    assert [row["holds"] for row in rows[2:4]] == ["yes", "no"] and "Of another model." in text


@pytest.mark.parametrize(
    ("ours", "ends", "holds"),
    [
        (7, (6, 8), "yes"),
        (7, (4, 8), "unsure"),
        (16, (14, 18), "unsure"),
        (3, (1, 4), "no"),
        (18, (16, 20), "no"),
        (7, None, "yes"),
        (4, None, "no"),
    ],
)
def test_a_difference_holds_where_its_whole_interval_does(ours: float, ends: tuple | None, holds: str) -> None:
    claim = Claim("says", "source", "points", (5.0,), to=15.0)
    assert Finding(claim, "model", "4 x 2", 5.0, 15.0, ours, ends).holds == holds


def test_curves_of_every_size_stand_in_the_report(file: Path) -> None:
    file.write_text(
        TEXT.split("[[caches]]")[0].replace("made up", "a model $_{$ <b>")
        + '[[curves]]\npolicies = ["LRU", "Che"]\n[[curves]]\nnblocks = [1]\npolicies = ["Belady"]'
    )
    experiment = lab.load(file)
    lab.run(experiment)
    text = lab.report(experiment).read_text()
    rows = list(csv.DictReader((file.with_suffix("") / "curves.csv").open()))
    assert len(rows) == 8 + 8 + 32 and text.count("<svg") == 1 and rows[0]["model"] == "a model $_{$ <b>"
    found = {(row["policy"], row["nways"]): float(row["hit_rate"]) for row in rows}
    for policy, nblocks, ways in (("LRU", 4, 3), ("Belady", 1, 9)):
        hits = sum(int(replay(calls(trace), Setting(nblocks, ways, policy)).hits.sum()) for trace in TRACES)
        assert found[policy, str(ways)] == pytest.approx(hits / 960, abs=1e-6)
    assert found["Che", "8"] == 1.0 and 0 < found["Che", "3"] < found["LRU", "3"]


WRONG_CURVES = [
    ('policies = ["SIEVE"]', "two.toml: [[curves]] 1, policies has 'SIEVE'; allowed: LRU, Belady"),
    ('policies = ["LRU"]\nnblocks = ["all"]', "two.toml: [[curves]] 1, nblocks has 'all'; allowed: a whole number or"),
    ('policies = ["LRU"]\nmapping = "any"', "two.toml: [[curves]] 1, mapping has 'any'; allowed: modulo, prefix, hash"),
    ('policies = ["LRU"]\nmodels = ["any"]', "two.toml: [[curves]] 1, models has 'any'; allowed: made up"),
]


@pytest.mark.parametrize(("keys", "line"), WRONG_CURVES, ids=[line[10:60] for _, line in WRONG_CURVES])
def test_a_wrong_curve_is_one_line_with_its_key(file: Path, keys: str, line: str) -> None:
    file.write_text(f"{TEXT}\n[[curves]]\n{keys}")
    with pytest.raises(ConfigError, match=re.escape(line)):
        lab.load(file)


WRONG_CLAIMS = [
    ('"points"', '"point"', "two.toml: [[claims]] 1, figure is 'point'; allowed: hits, points, ratio, same experts"),
    ('beside = "RANDOM"\n', "", "two.toml: [[claims]] 1: 'points' needs beside"),
    ("share = 0.25", "share = 0.25\nnways = [2]", "two.toml: [[claims]] 3: 'covered' has no nways"),
    ("share = 0.25\n", "", "two.toml: [[claims]] 3: 'covered' needs share"),
    ("0.0]", "0.0, 1.0]", "two.toml: [[claims]] 2, published has 3 values; give one, or one for each of nways"),
    ("published = [50]", "published = []", "two.toml: [[claims]] 3, published has 0 values"),
    ('"belady"', '"belay"', "two.toml: [[claims]] 2, policies: replacement policy 'belay' is unknown"),
    ("[5, 12]", "[5, 33]", "two.toml: [[claims]] 2, made up: ways (nways) of the cache: 33"),
    ("nblocks = 1", 'nblocks = 1\nmodels = ["none"]', "two.toml: [[claims]] 2, models has 'none'; allowed: made up"),
]


@pytest.mark.parametrize(("was", "given", "line"), WRONG_CLAIMS, ids=[line[10:60] for _, _, line in WRONG_CLAIMS])
def test_a_wrong_claim_is_one_line_with_its_key(file: Path, was: str, given: str, line: str) -> None:
    text = TEXT + CLAIMS.format(five="1.0")
    assert was in CLAIMS.format(five="1.0")
    head, _, tail = text.partition("[[claims]]")
    file.write_text(head + "[[claims]]" + tail.replace(was, given, 1))
    with pytest.raises(ConfigError, match=re.escape(line)):
        lab.status(lab.load(file))


def test_figures_of_claims_are_all_computed() -> None:
    assert set(FIGURES) == {*OF_CACHES, *OF_TRACES}


EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments").glob("*.toml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_of_the_repository_can_be_read(path: Path) -> None:
    """And of each the results are beside it."""
    experiment = lab.load(path)
    traces = [name for model in experiment.models for name in model.traces]
    assert experiment.about and all(experiment.trace_path(name).is_file() for name in traces)
    assert (experiment.folder / ("claims.csv" if experiment.claims else "results.csv")).is_file()
