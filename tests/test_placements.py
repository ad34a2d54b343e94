"""The comparison of placements runs on the simulated device, and its picture is of what was going on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import placements  # noqa: E402

from gpu_cache.trace import make_trace  # noqa: E402
from hybrid.commands.timeline import LANES, Span, Timeline, busy_seconds  # noqa: E402
from hybrid.files.traces import write_trace  # noqa: E402


def test_all_ways_choose_the_same_tokens_and_none_has_more_slots(tmp_path, capsys) -> None:
    output, picture = tmp_path / "results.json", tmp_path / "token.svg"
    flags = ["--rounds", "1", "--max-tokens", "6", "--policies", "LRU,FIFO", "--admissions", "always", "--threads", "1"]
    flags += ["--cache-nways", "2", "--cache-delay", "0", "--output", str(output), "--timeline", str(picture)]
    placements.main(flags)
    report = json.loads(output.read_text())
    found = {result["way"]: result for result in report["results"]}
    static = ["static, 2 whole layers", "static, most called experts"]
    assert list(found) == ["CPU only", *static, "LRU, always", "FIFO, always"]
    assert all(result["same_tokens"] for result in found.values())
    assert [result["slots"] for result in found.values()] == [0, 32, 32, 32, 32]
    for name in static:
        assert found[name]["copied_bytes_per_token"] == [0] and found[name]["hit_rate"][0] > 0.05
    assert found["LRU, always"]["copied_bytes_per_token"][0] > 0 and found["CPU only"]["hit_rate"] == []
    assert capsys.readouterr().out.count("\n| ") == len(found)
    assert all(word in picture.read_text() for word in ("misses", "copy", "simulated device"))


def test_a_trace_routes_in_all_ways_and_other_sequences_of_it_are_profiled(tmp_path, capsys) -> None:
    """Those that are timed ask for experts 0 and 1, those behind them for 2 and 3."""
    sequences = placements.TIMED + len(placements.PROFILE_PROMPTS)
    sequence, layer, rank = (axis.reshape(-1) for axis in np.indices((sequences, 16, 2)))
    columns = {"step": sequence, "sequence": sequence, "position": 0 * sequence, "layer": layer, "rank": rank}
    columns |= {"expert": rank + 2 * (sequence >= placements.TIMED), "score": rank * 0 + 0.5}
    write_trace(tmp_path / "trace.csv", make_trace(columns, 16, 16))
    output = tmp_path / "results.json"
    flags = ["--rounds", "1", "--max-tokens", "4", "--policies", "LRU", "--admissions", "always", "--threads", "1"]
    flags += ["--cache-nways", "2", "--cache-delay", "0", "--route-trace", str(tmp_path / "trace.csv")]
    flags += ["--output", str(output)]
    placements.main(flags)
    report = json.loads(output.read_text())
    found = {result["way"]: result["hit_rate"] for result in report["results"]}
    assert found["static, most called experts"] == [0.0] and found["static, 2 whole layers"] == [2 / 16]
    assert found["LRU, always"][0] > 0.8 and report["machine"]["route_trace"] == str(tmp_path / "trace.csv")
    assert all(result["same_tokens"] for result in report["results"])
    assert "some prompts are profiled" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--policies", "LRU,best"], "best is unknown; allowed: all, 2Q"),
        (["--device", "cpu"], "has no slots to compare"),
        (["--timeline", "token.gif"], "a figure ends in .png, .svg or .pdf"),
    ],
)
def test_what_is_unknown_is_refused(flags, words, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        placements.main(flags)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_device_step_tells_of_both_sides(monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(placements, "WATCHED", range(66, 68))
    before = torch.get_num_threads()
    flags = ["--step-on", "torch-cpu", "--gpu-kv-tokens", "64", "--threads", "1", "--cache-delay", "0"]
    try:
        options, _ = placements.parse(flags)
        torch.set_num_threads(1)
        draw, busy = placements.one_token(options, "title")
    finally:
        torch.set_num_threads(before)
    assert set(busy) == set(LANES) and 0 < busy["device"] < 1 and 0 < busy["threads"] < 1
    labels = {handle.get_text() for handle in draw().legends[0].get_texts()}
    assert {"attention", "older tokens", "route", "join", "head", "misses", "lookup"} <= labels


def test_a_step_is_cut_out_of_all_that_was_told() -> None:
    timeline = Timeline()
    for what, start, end in (("route", 1, 3), ("attention", 2, 6), ("join", 2, 4), ("misses", 8, 9), ("wait", 5, 7)):
        timeline(what, start, end)
    spans = timeline.between(2, 8)
    assert spans == [Span("attention", 0, 4), Span("join", 0, 2), Span("route", 0, 1), Span("wait", 3, 5)]
    assert busy_seconds(spans, "device") == 4 and busy_seconds(spans, "threads") == 0
    two = [Span("misses", 0, 2), Span("lookup", 1, 4), Span("misses", 6, 7)]
    assert busy_seconds(two, "threads") == 5
