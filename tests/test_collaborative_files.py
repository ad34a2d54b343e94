"""The files of the collaborative inference of arXiv 2512.16473, in its columns, and its way to count hits."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hybrid.commands import run as main
from hybrid.core import StepTimes
from hybrid.files.traces import read_trace
from hybrid.machine.meters import Meters, Reading, TemperatureMeter
from hybrid.serving.recorder import Recorder
from hybrid.serving.scheduler import StepRecord

RUN = ["--prompt", "Once upon a time", "--max-tokens", "6", "--max-seq-len", "256", "--ignore-eos", "--hide-resp"]
CACHE = ["--device", "simulated", "--cache-nblocks", "14", "--cache-nways", "4", "--cache-mapping", "prefix"]


class Script:
    def __init__(self, *readings: Reading) -> None:
        self._readings = iter(readings)

    def read(self) -> Reading:
        return next(self._readings)


def recorded(*seconds: float, readings: list[Reading]) -> Recorder:
    recorder = Recorder(Script(readings[0], readings[0], *readings))  # type: ignore[arg-type]
    recorder(StepRecord(4, 0, 1, StepTimes(), 9.0))  # a prompt, which they do not count
    for time in seconds:
        recorder(StepRecord(0, 1, 1, StepTimes(), time))
    return recorder


def test_the_times_of_decoding_and_the_clock_of_each_second() -> None:
    from hybrid.serving.generation_times import clock_rows, time_rows

    cold, warm, unknown = (
        Reading(4800.9, None, None, 60.0),
        Reading(5000.0, None, None, 70.5),
        Reading(None, None, None),
    )
    steps = recorded(0.5, 0.75, 2.0, readings=[cold, warm, unknown]).decoding
    assert list(time_rows(steps)) == [
        [1, "0.500000", 0, "2.000", "4800", "60.0"],
        [2, "0.750000", 1, "1.600", "5000", "70.5"],
        [3, "2.000000", 3, "0.923", "nan", "nan"],
    ]
    assert list(clock_rows(steps)) == [
        [0, "60.0", "4800"], [1, "70.5", "5000"], [2, "nan", "nan"], [3, "nan", "nan"],
    ]  # fmt: skip


def test_hits_of_tokens_are_counted_by_layer_one_and_all() -> None:
    recorder = Recorder()
    counts = [[2, 2], [2, 1], [2, 0], [2, 0]]
    cache = np.array([[*pair, 0, 0, 0] for pair in counts])
    assert recorder.summary(0, "avx2", 1).one_hit is None
    recorder(StepRecord(3, 0, 1, StepTimes(), 1.0, cache))
    recorder(StepRecord(0, 2, 2, StepTimes(), 1.0, cache))
    assert recorder.summary(0, "avx2", 1).all_hit is None
    recorder(StepRecord(0, 1, 1, StepTimes(), 1.0, cache))
    whole, cached = recorder.summary(0, "avx2", 1), recorder.summary(0, "avx2", 1, 2)
    assert (whole.one_hit, whole.all_hit) == (0.5, 0.25) and (cached.one_hit, cached.all_hit) == (1.0, 0.5)
    assert "experts hit  at least one 100.0%, all 50.0%" in str(cached)


def test_the_temperature_is_that_of_the_processor(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("hybrid.machine.meters._HWMON", tmp_path)
    assert TemperatureMeter().read() is None
    for number, (name, label, value) in enumerate(
        (("nvme", "Composite", 90), ("k10temp", "Tctl", 61), ("k10temp", "x", 99))
    ):
        folder = tmp_path / f"hwmon{number}"
        folder.mkdir()
        for file, text in {"name": name, "temp1_label": label, "temp1_input": f"{value}500"}.items():
            (folder / file).write_text(f"{text}\n")
    (tmp_path / "hwmon2" / "temp1_input").write_text("not a number")
    assert TemperatureMeter().read() is None
    (tmp_path / "hwmon2" / "name").write_text("acpitz")
    assert Meters().read().cpu_celsius == 61.5


def test_a_run_writes_the_files_in_their_columns(tmp_path: Path) -> None:
    choices, times = tmp_path / "expert_choices.csv", tmp_path / "token_gen_time.csv"
    flags = [*RUN, *CACHE, "--cache-delay", "0", "--token-csv", str(times)]
    for target in (choices, tmp_path / "trace.csv", choices):  # written again over its own kind
        result = CliRunner().invoke(main.app, [*flags, "--trace", str(target)])
        assert result.exit_code == 0 and "experts hit  at least one" in result.stderr, result.output
    whole, theirs = read_trace(tmp_path / "trace.csv", 16, 16), read_trace(choices, 16, 16)
    decoded = whole.position >= whole.position.max() - theirs.position.max()
    assert len(theirs) == decoded.sum() > 0
    width = int(whole.rank.max()) + 1
    mine = np.sort(whole.expert[decoded].reshape(-1, width), axis=1)
    assert np.array_equal(mine, theirs.expert.reshape(-1, width))
    rows = list(csv.reader(times.open()))
    assert rows[0][3] == "Accumulated Generation Throughput (tokens/s)" and len(rows) == 1 + 5
    assert all(float(row[5]) != 0 and float(row[1]) > 0 for row in rows[1:])
    clock = list(csv.reader((tmp_path / "cpu_freq_avg.csv").open()))
    assert clock[0][:2] == ["Seconds", "Temperature"] and all(float(row[1]) and float(row[2]) for row in clock[1:])


def test_a_file_of_something_else_beside_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cpu_freq_avg.csv").write_text("dear diary\n")
    result = CliRunner().invoke(main.app, [*RUN, "--token-csv", str(tmp_path / "token_gen_time.csv")])
    assert result.exit_code == 2 and "is kept" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cpu_freq_avg.csv"]


@pytest.mark.parametrize("name", ["expert_choices.csv", "trace.csv"])
def test_a_trace_of_one_kind_does_not_replace_the_other(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(
        "Index,Block_0\n0,1\n" if name == "trace.csv" else "step,sequence,position,layer,rank,expert,score\n"
    )
    before = path.read_text()
    result = CliRunner().invoke(main.app, [*RUN, "--trace", str(path)])
    assert result.exit_code == 2 and "is kept" in result.stderr and path.read_text() == before
