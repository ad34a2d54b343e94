"""The files of a run: what each row says, and that nothing keeps a run from ending as it should."""

from __future__ import annotations

import csv
import errno
import json
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hybrid.commands import run as main
from hybrid.core import StepTimes
from hybrid.engine.experts.report import CacheReport
from hybrid.machine.meters import EnergyMeter, FrequencyMeter, Meters, Reading
from hybrid.serving import recorder as report
from hybrid.serving.recorder import CACHEHIT_COLUMNS, POWER_COLUMNS, TOKEN_COLUMNS, Recorder
from hybrid.serving.scheduler import StepRecord

RUN = ["--prompt", "Once upon a time", "--max-tokens", "12", "--max-seq-len", "256", "--ignore-eos", "--hide-resp"]
CACHE = ["--device", "simulated", "--cache-nblocks", "14", "--cache-nways", "4"]
PATIENCE = 600  # seconds until a test that hangs fails
SAYING = """
from hybrid.commands.console import run_app
from hybrid.commands.run import app
from hybrid.serving.recorder import Recorder

record, left = Recorder.__call__, ["a step has been done"]

def say_once(recorder, step):
    record(recorder, step)
    while left:
        print(left.pop(), flush=True)

Recorder.__call__ = say_once
run_app(app, "run")
"""


def interrupted(number: signal.Signals, *flags: str) -> list[str]:
    """Lines on stderr of a run that gets a signal in the middle of its steps, and ends as it should."""
    command = [sys.executable, "-c", SAYING, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "a step has been done\n"
    process.send_signal(number)
    _, notes = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, notes
    return notes.splitlines()


class Script:
    """Meters that read what they are told."""

    def __init__(self, *readings: Reading) -> None:
        self._readings = iter(readings)

    def read(self) -> Reading:
        return next(self._readings)


def recorded(*readings: Reading) -> Recorder:
    recorder = Recorder(Script(*readings))  # type: ignore[arg-type]
    counts = np.array([[2, 1, 0, 1, 0], [3, 0, 1, 2, 1]])
    recorder(StepRecord(4, 0, 0, StepTimes(), 0.5))
    recorder(StepRecord(1, 1, 2, StepTimes(), 0.25, counts, (1, 0)))
    return recorder


def test_a_row_for_every_token_and_every_layer() -> None:
    rows = [Reading(None, None, None), Reading(2000.0, 1.0, None), Reading(3000.5, 3.0, None)]
    recorder = recorded(*rows)
    assert list(recorder.token_rows()) == [
        [1, 1, 1, "0.250000", "0.750000", "1.33", "3000.500"],
        [2, 0, 1, "0.250000", "0.750000", "2.67", "3000.500"],
    ]
    assert list(recorder.cachehit_rows()) == [[1, 0, 2, 1, 0, 1, 0], [1, 1, 3, 0, 1, 2, 1]]


def test_power_is_energy_over_time_and_empty_where_nothing_tells() -> None:
    recorder = recorded(Reading(None, 1.0, None), Reading(None, 2.0, None), Reading(None, 5.0, None))
    assert list(recorder.power_rows()) == [
        [0, 0, "0.500000", "2.000", "", ""],
        [1, 2, "0.250000", "12.000", "", "1.500"],
    ]
    both = recorded(Reading(None, 1.0, 1.0), Reading(None, 2.0, 1.0), Reading(None, 5.0, 2.0))
    assert list(both.power_rows())[1] == [1, 2, "0.250000", "12.000", "4.000", "2.000"]
    nothing = recorded(*[Reading(None, None, None)] * 3)
    assert list(nothing.power_rows())[1] == [1, 2, "0.250000", "", "", ""]


def test_rapl_counters_begin_anew_when_they_are_full(tmp_path, monkeypatch) -> None:
    for number, name in enumerate(("package-0", "psys")):
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        for file, text in {"name": name, "max_energy_range_uj": "9999999", "energy_uj": "9000000"}.items():
            (zone / file).write_text(text)
    monkeypatch.setattr("hybrid.machine.meters._RAPL", tmp_path)
    meter = EnergyMeter()
    assert meter.package_joules() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000")
    assert meter.package_joules() == 2.0
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.package_joules() is None


class FakeNvml:
    """Two GPUs, whose counters of millijoules do not begin at zero; once it is `gone`, as the driver is."""

    gone = False

    def __init__(self, *millijoules: int) -> None:
        self.millijoules = list(millijoules)

    def nvmlInit(self) -> None:  # noqa: N802  the library's name
        if self.gone:
            raise RuntimeError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.millijoules)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        self.nvmlInit()
        return self.millijoules[handle]


def test_the_energy_of_gpus_is_counted_from_the_start_and_told_as_unreadable_once_it_is(monkeypatch) -> None:
    nvml = FakeNvml(5000, 70)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = EnergyMeter()
    assert meter.gpu_joules() == 0
    nvml.millijoules = [8000, 570]
    assert meter.gpu_joules() == 3.5
    nvml.gone = True
    assert meter.gpu_joules() is None and EnergyMeter().gpu_joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter().gpu_joules() is None


def test_the_clock_is_that_of_the_processors_that_compute(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("hybrid.machine.meters._CPUS", tmp_path)
    monkeypatch.setattr("hybrid.machine.meters._CPUINFO", tmp_path / "cpuinfo")
    assert FrequencyMeter().read() is None
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 1000.0\nflags: x\ncpu MHz\t\t: 2000.0\n")
    assert FrequencyMeter().read() == 1500
    for cpu, khz in ((0, 1_000_000), (1, 3_000_000)):
        (tmp_path / f"cpu{cpu}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "cpufreq" / "scaling_cur_freq").write_text(str(khz))
    assert FrequencyMeter().read() == 2000 and FrequencyMeter([1]).read() == 3000
    assert Meters().read().cpu_mhz == 2000


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_one_run_writes_every_file(tmp_path) -> None:
    names = {
        "breakdown-csv": "b.csv", "cachehit-csv": "h.csv", "token-csv": "t.csv", "power-csv": "p.csv",
        "trace": "trace.csv", "cache-save": "w.json",
    }  # fmt: skip
    files = {flag: tmp_path / name for flag, name in names.items()}
    flags = [text for flag, path in files.items() for text in (f"--{flag}", str(path))]
    result = CliRunner().invoke(main.app, [*RUN, *CACHE, "--cache-delay", "0", *flags, "--json"])
    assert result.exit_code == 0, result.output
    cache = json.loads(result.stdout)["cache"]
    hits, breakdown = rows(files["cachehit-csv"]), rows(files["breakdown-csv"])
    assert tuple(hits[0]) == CACHEHIT_COLUMNS and len(hits) == 16 * len(breakdown) == 16 * 12
    for name in ("calls", "hits", "loading", "misses", "evictions"):
        assert sum(int(row[name]) for row in hits) == cache[name]
    assert cache["hit_rate"] == cache["hits"] / cache["calls"] and len(cache["layer_hit_rates"]) == 16
    assert cache["verdict"]["best"] in ("cpu", "static", "cache")
    parts = ("cpu_experts", "device_experts", "copy", "lookup", "join", "wait")
    assert all(float(row[f"{part}_ms"]) >= 0 for row in breakdown for part in parts)
    assert sum(float(row["device_experts_ms"]) for row in breakdown) > 0
    assert tuple(rows(files["token-csv"])[0]) == TOKEN_COLUMNS and len(rows(files["token-csv"])) == 12
    assert tuple(rows(files["power-csv"])[0]) == POWER_COLUMNS
    assert tuple(rows(files["trace"])[0]) == ("step", "sequence", "position", "layer", "rank", "expert", "score")
    assert {path.name for path in tmp_path.iterdir()} == set(names.values())


@pytest.mark.parametrize(("late", "repeatable", "said"), [(3, False, True), (0, False, False), (3, True, False)])
def test_hits_that_depend_on_load_are_said_to(late: int, repeatable: bool, said: bool) -> None:
    counts = {field.name: 0 for field in fields(CacheReport)}
    texts = {"geometry": "2 x 4 slots", "policy": "LRU", "admission": "always", "following": None, "verdict": None}
    report = CacheReport(**counts | texts | {"layer_hit_rates": (), "late_copies": late, "repeatable": repeatable})
    first = str(report).splitlines()[0]
    assert first.startswith("cache ") and ("depends on the load of this machine: --cache-delay 0" in first) == said
    assert report.to_dict()["repeatable"] is repeatable


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, monkeypatch) -> None:
    def full(path: Path, columns: object, rows: object) -> None:
        with report.output_file(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hybrid.commands.outputs.write_csv", full)
    result = CliRunner().invoke(main.app, [*RUN, "--breakdown-csv", str(tmp_path / "b.csv")])
    assert result.exit_code == 0 and result.stderr.count("the disk is full") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_whole_files(tmp_path, number) -> None:
    trace, hits = tmp_path / "trace.csv", tmp_path / "h.csv"
    flags = ["--n-prompts", "500", "--max-tokens", "200", "--trace", str(trace), "--cachehit-csv", str(hits)]
    interrupted(number, *RUN, *CACHE, *flags)
    assert rows(hits)[0]["step"] == "0" and rows(trace)[0]["rank"] == "0"
    assert {path.name for path in tmp_path.iterdir()} == {"trace.csv", "h.csv"}
