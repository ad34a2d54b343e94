"""`hybrid trace`: traces of others are converted, described and checked, and drawn, by one command each."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from routing import random_trace
from typer.testing import CliRunner

from gpu_cache import bounds
from gpu_cache.bounds import next_ranks
from gpu_cache.trace import make_trace
from gpu_cache.traces import FORMATS
from hybrid.commands import simulate
from hybrid.commands.trace import app
from hybrid.files.traces import read_trace, write_trace

OTHERS = Path(__file__).parent / "traces" / "others"
ROUTE, FINGERPRINT = OTHERS / "bigmoeonedge.route.csv", OTHERS / "fingerprint_examples.json"


def ran(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_a_trace_is_converted_and_what_is_lost_is_said(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(ROUTE), str(tmp_path / "t.csv")])
    assert result.exit_code == 0 and "note: route lacks digits of scores" in result.stderr and not result.stdout
    assert len(read_trace(tmp_path / "t.csv")) == 576
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "t.csv"), str(tmp_path / "t.npz")])
    assert (
        result.exit_code == 0
        and result.stderr == "note: npz cannot hold scores, and which tokens were computed together\n"
    )
    ran("convert", tmp_path / "t.npz", tmp_path / "t.other", "--to", "policylang", "--experts", "128")
    assert json.loads((tmp_path / "t.other").read_text().splitlines()[0])["num_experts"] == 128


def test_what_routers_say_early_is_kept_by_our_formats_alone(tmp_path: Path) -> None:
    trace, early, other = random_trace(1), tmp_path / "early.csv", tmp_path / "other.csv"
    write_trace(early, replace(trace, next_expert=trace.expert))
    write_trace(other, trace)
    result = CliRunner().invoke(app, ["convert", str(early), str(other), str(tmp_path / "both.csv")])
    assert result.exit_code == 0
    assert result.stderr == "note: 1 of 2 traces lack what routers say one layer early: -1 there\n"
    assert CliRunner().invoke(app, ["convert", str(early), str(early), str(tmp_path / "both.csv")]).stderr == ""
    assert CliRunner().invoke(app, ["convert", str(other), str(other), str(tmp_path / "both.csv")]).stderr == ""
    ran("convert", early, other, tmp_path / "both.csv")
    for name, share, words in ((early, 1, "of 100.0% of the calls"), ("both.csv", 0.5, "of 50.0% of the calls"),
                               (other, 0, "early is not recorded")):  # fmt: skip
        assert (
            words in ran("info", tmp_path / name)
            and json.loads(ran("info", tmp_path / name, "--json"))["early"] == share
        )
    both = read_trace(tmp_path / "both.csv").next_expert
    assert both is not None and both.tolist() == [*trace.expert.tolist(), *[-1] * len(trace)]
    result = CliRunner().invoke(app, ["convert", str(early), str(tmp_path / "early.npz")])
    assert "note: npz cannot hold what routers say one layer early\n" in result.stderr


def bench_program(name: str) -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parent.parent / "bench" / name))


def test_recording_takes_its_flag_before_and_after_the_folder(tmp_path: Path, monkeypatch) -> None:
    main, seen = bench_program("record_traces.py")["main"], []
    monkeypatch.setitem(main.__globals__, "record", lambda folder, name, prompts, early: seen.append((folder, early)))
    for arguments, early in (([tmp_path, "--next-gate"], True), (["--next-gate", tmp_path], True), ([tmp_path], False)):
        monkeypatch.setattr("sys.argv", ["record_traces.py", *map(str, arguments)])
        seen.clear()
        main()
        assert seen == [(tmp_path, early)] * 3


def test_every_timed_replay_works_out_its_future(monkeypatch) -> None:
    main, worked = bench_program("replays.py")["main"], []
    monkeypatch.setattr(bounds, "next_ranks", lambda calls: worked.append(calls) or next_ranks(calls))
    monkeypatch.setattr("sys.argv", ["replays.py", "--calls", "1000", "--only", "14x4", "--policy", "LRU,Belady"])
    main()
    assert len(worked) == 2  # of the mappings modulo and prefix


def test_a_trace_may_be_written_again_over_its_own_kind_alone(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="some formats need pyarrow, of the extra [research]")
    write_trace(tmp_path / "t.csv", random_trace(1, layers=3))
    for known in FORMATS:
        if known.write:
            target = tmp_path / f"target-{known.name}"
            ran("convert", tmp_path / "t.csv", target, "--to", known.name)
            ran("convert", tmp_path / "t.csv", target, "--to", known.name)
            target.write_text("dear diary")
            assert "is kept" in refused("convert", tmp_path / "t.csv", target, "--to", known.name)
            assert target.read_text() == "dear diary"


def test_several_traces_become_one(tmp_path: Path) -> None:
    ran("convert", FINGERPRINT, FINGERPRINT, tmp_path / "two.csv")
    assert sorted(set(read_trace(tmp_path / "two.csv").sequence.tolist())) == [0, 1]
    assert "not of one model" in refused("convert", FINGERPRINT, ROUTE, tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", ROUTE], "no TARGET"),
        (["convert", ROUTE, "t.txt"], "--to"),
        (["convert", ROUTE, "t.csv", "--to", "none"], "no format 'none'.*route"),
        (["convert", ROUTE, "t.pt", "--to", "sglang"], "only read"),
        (["info", ROUTE, "--from", "npz"], "no whole npz"),
        (["info", "missing.csv"], "no such file"),
        (["info", ROUTE, "--experts", "4"], "unknown expert"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str | Path], words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    import re

    assert re.search(words, refused(*arguments)) and not list(tmp_path.iterdir())


def test_info_says_the_model_and_the_reuse() -> None:
    text = ran("info", ROUTE)
    assert "48 MoE layers of 128 experts, 6 for a token" in text and "tokens     2 in 1 sequence" in text
    facts = json.loads(ran("info", ROUTE, "--json"))
    trace = read_trace(ROUTE)
    first, second = (
        [set(trace.expert[(trace.position == at) & (trace.layer == layer)].tolist()) for layer in range(48)]
        for at in (28, 29)
    )
    shared = [len(a & b) for a, b in zip(first, second, strict=True)]
    assert facts["reuse"]["tokens"][0] == [number / 6 for number in shared]
    assert facts["reuse"]["one_of_token"] == [float(number > 0) for number in shared]
    across = [len(a & b) for token in (first, second) for a, b in zip(token, token[1:], strict=False)]
    assert sum(facts["reuse"]["one_across"]) * 2 == sum(number > 0 for number in across)
    assert facts["calls"] == 576 and facts["format"] == "route" and facts["prompt_tokens"] == 0


def test_chance_is_that_of_drawing_evenly(tmp_path: Path) -> None:
    """Mixtral's: two of eight share at least one with two others in 13 of 28 draws."""
    write_trace(tmp_path / "t.csv", random_trace(1, steps=4, experts=8, top_k=2))
    reuse = json.loads(ran("info", tmp_path / "t.csv", "--json", "--experts", "8"))["reuse"]
    assert (reuse["chance"], reuse["chance_of_one"], reuse["chance_of_all"]) == (0.25, 1 - 15 / 28, 1 / 28)


def test_head_shows_the_first_choices() -> None:
    lines = ran("head", ROUTE, "-n", "2").splitlines()
    assert len(lines) == 4 and [cell.strip() for cell in lines[2].split("|")[1:5]] == ["0", "0", "28", "0"]
    assert "60 " in lines[2] and "0.215" in lines[2]


def test_check_names_the_first_place_of_what_is_wrong(tmp_path: Path) -> None:
    assert "no " not in [line[:3] for line in ran("check", FINGERPRINT).splitlines()]
    names = ("step", "sequence", "position", "layer", "rank", "expert", "score")
    rows = [
        (0, 0, 0, 0, 0, 1, 0.5), (0, 0, 0, 0, 1, 1, 0.6), (0, 0, 0, 1, 0, 1, 0.5), (0, 0, 0, 1, 2, 2, 0.5),
        (2, 0, 2, 1, 0, 1, 0.5), (2, 0, 2, 0, 0, 2, 0.5),
        (3, 0, 3, 0, 0, 2, 0.5), (3, 0, 3, 0, 1, 3, 0.5),
    ]  # fmt: skip
    write_trace(tmp_path / "t.csv", make_trace(dict(zip(names, zip(*rows, strict=True), strict=True)), 2, 4))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "t.csv")])
    broken = {line[5:]: line[:3] for line in result.stdout.splitlines()}
    assert result.exit_code == 2 and "breaks 8 of 8 rules, the first in 1 rows" in result.stderr, broken
    assert (
        "the experts of a token at a layer differ; step 0, sequence 0, position 0, layer 0, rank 1, expert 1" in broken
    )


def test_formats_are_listed() -> None:
    listed = json.loads(ran("formats", "--json"))
    assert [one["name"] for one in listed] == [known.name for known in FORMATS]
    assert all(known.name in ran("formats") for known in FORMATS)


def test_a_trace_of_others_is_replayed_at_once() -> None:
    flags = ["--trace", str(ROUTE), "--policy", "LRU,bypass-Belady", "--nways", "8", "--output", "json"]
    result = CliRunner().invoke(simulate.app, [*flags, "--workers", "1"])
    assert result.exit_code == 0 and [row["calls"] for row in json.loads(result.stdout)["results"]] == [576, 576]
