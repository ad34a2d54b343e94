"""What this machine costs is measured once, kept, and measured anew when the machine is another."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from steps import step

import cpu_kernels
from hybrid.config import CacheConfig, DeviceConfig, EngineConfig
from hybrid.engine.engine import Engine
from hybrid.engine.experts.calibration import measured_rows, time_device, time_threads
from hybrid.engine.experts.costs import expert_key, measured_costs
from hybrid.machine.hardware import probe
from hybrid.machine.profile import (
    ExpertTimes,
    LinkSpeed,
    MachineProfile,
    cached_profile,
    machine_mark,
)

TIMES = ExpertTimes((1, 2, 8), (1.0, 1.5, 4.5), (0.1, 0.2, 0.8), 0.05)
LINK = LinkSpeed(25e9, 24e9, 20e9, 40e9, 30e9, 1e-5)


def times_out() -> tuple[ExpertTimes, LinkSpeed]:
    raise AssertionError("measured again")


def embedded(folder: Path, **choices) -> Engine:
    sizes = {"threads": 2, "max_batch": 2, "chunk_size": 32, "max_seq_len": 128}
    cache = CacheConfig(14, 4, **choices)
    return Engine.open(EngineConfig(**sizes, device="simulated", cache=cache, cache_dir=folder))


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (2, 1.5), (5, 3.0), (8, 4.5), (16, 9.0)])
def test_rows_between_lie_on_a_line_and_beyond_cost_in_proportion(rows, seconds) -> None:
    assert TIMES.on_threads(rows) == pytest.approx(seconds)
    assert replace(TIMES, device=TIMES.threads).on_device(rows) == pytest.approx(seconds)


def test_a_profile_is_measured_once_for_each_kind_of_expert(tmp_path) -> None:
    first = cached_profile(tmp_path / "new", "mark", "a", lambda: (TIMES, LINK))
    assert first == MachineProfile({"a": TIMES}, LINK)
    assert cached_profile(tmp_path / "new", "mark", "a", times_out) == first
    other = replace(TIMES, device=None)
    both = cached_profile(tmp_path / "new", "mark", "b", lambda: (other, None))
    assert both == MachineProfile({"a": TIMES, "b": other}, LINK)
    assert cached_profile(tmp_path / "new", "mark", "b", times_out) == both
    assert cached_profile(tmp_path / "new", "other", "a", lambda: (other, None)) == MachineProfile({"a": other}, None)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 0, "experts": {}}', '{"version": 1, "experts": 3, "link": null}',
             '{"version": 1, "experts": {"a": {"rows": [1], "threads": [], "device": null}}, "link": null}'],
)  # fmt: skip
def test_a_file_that_says_nothing_is_replaced(tmp_path, text) -> None:
    file = tmp_path / "machine-mark.json"
    file.write_text(text)
    assert cached_profile(tmp_path, "mark", "a", lambda: (TIMES, LINK)).experts == {"a": TIMES}
    assert json.loads(file.read_text())["version"] == 1


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", None):
        assert cached_profile(folder, "mark", "a", lambda: (TIMES, LINK)).link == LINK


def test_another_machine_or_device_has_another_mark() -> None:
    here = probe()
    marks = {
        machine_mark(here, 2),
        machine_mark(here, 1),
        machine_mark(here, 2, "a GPU"),
        machine_mark(replace(here, cpu_model="other"), 2),
        machine_mark(replace(here, memory_total=1), 2),
        machine_mark(replace(here, isa="portable"), 2),
    }
    assert len(marks) == 6
    assert machine_mark(replace(here, memory_available=1, device_memory=5), 2) in marks  # what changes all the time


def test_costs_of_a_token_are_those_of_a_row_and_of_copies_beside_reads() -> None:
    costs = measured_costs(TIMES, LINK, 10**9)
    assert (costs.cpu, costs.device, costs.start) == (1.0, 0.1, 0.05)
    assert costs.copy == pytest.approx(1e-5 + 1 / 20)
    assert costs.cpu_row == TIMES.threads[-1] / TIMES.rows[-1] and costs.device_row == TIMES.device[-1] / TIMES.rows[-1]


def test_an_engine_measures_its_experts_once(tmp_path, monkeypatch) -> None:
    with embedded(tmp_path) as engine:
        key = expert_key(engine.experts.plan.shape, "bf16")
        times = engine.profile.experts[key]
        assert times.rows == (1, 2, 4, 8, 32) and times.device is None
        assert all(0 < seconds < 60 for seconds in times.threads)
        assert engine.experts.costs.cpu == times.threads[0] and engine.experts.costs.cpu_row == times.threads[-1] / 32
    (file,) = tmp_path.glob("machine-*.json")
    monkeypatch.setattr("hybrid.engine.experts.calibration.time_threads", times_out)
    with embedded(tmp_path) as engine:
        assert engine.profile.experts[key] == times
    file.unlink()
    with embedded(tmp_path, delay=3) as engine:  # that may be repeated: no clock decides anything
        assert engine.profile is None and not list(tmp_path.glob("machine-*.json"))


def test_the_threads_are_timed_on_experts_that_a_step_could_have(tmp_path) -> None:
    with embedded(tmp_path) as engine:
        times = time_threads(engine.plan, engine.pool, engine.addresses.weight, engine.addresses.buffer)
        assert len(times) == len(measured_rows(engine.plan)) and all(0 < seconds < 60 for seconds in times)


class Clocked:
    """A device on whose clock beginning a layer takes 1 s, and a row of an expert 0.25 s more."""

    def __init__(self, device) -> None:
        self.device, self.now = device, 0.0

    def load(self, slot: int, expert: int) -> None:
        self.device.load(slot, expert)

    def run(self, ids: np.ndarray):
        self.now += 1 + (ids >= 0).sum() / 4
        return self.device.run(ids)

    def join(self, ticket) -> None:
        self.device.join(ticket)

    def wait(self, ticket) -> None:
        self.device.wait(ticket)


def test_a_device_is_timed_through_what_it_does_for_a_step(tmp_path, monkeypatch) -> None:
    with embedded(tmp_path) as engine:
        device = Clocked(engine.experts.device)
        monkeypatch.setattr("hybrid.engine.experts.calibration.perf_counter", lambda: device.now)
        start, times = time_device(engine.plan, device)
        assert start == 1 and times == tuple(rows / 4 for rows in measured_rows(engine.plan))


def test_a_device_and_its_link_are_priced_together(tmp_path) -> None:
    """On torch's CPU device a copy is one within memory: slower than nothing, and no faster than a machine's memory."""
    pytest.importorskip("torch")
    from hybrid.engine.experts.calibration import measure_device
    from hybrid.machine.gpu import device_mark

    with embedded(tmp_path) as engine:
        place, weight = "cpu", "layers.0.ffn.experts"
        size = engine.store.tensors[weight].nbytes
        read = partial(cpu_kernels.read_bandwidth, engine.pool, engine.plan.isa, engine.addresses.weight(weight), size)
        times, link = measure_device(engine.plan, engine.experts.device, place, (1e-5,) * 5, read)
        assert times.device is not None and all(1e6 < rate < 1e13 for rate in (link.to_device, link.reads_beside))
        assert 0 < link.latency < 1
        costs = measured_costs(times, link, engine.experts.plan.slot_bytes)
        engine.experts.reprice(costs)
        assert engine.experts.costs == costs
        logits = step(engine, (0, 0, np.arange(20)))
    with embedded(tmp_path) as engine:  # measuring leaves nothing behind
        assert np.array_equal(step(engine, (0, 0, np.arange(20))), logits)
    assert device_mark(place) == "cpu"


def test_figures_of_a_simulated_device_are_used_as_they_are(tmp_path) -> None:
    device = DeviceConfig(copy_gbps=1.0, latency_us=5.0, read_gbps=10.0)
    config = EngineConfig(device="simulated", simulated=device, cache=CacheConfig(14, 4), cache_dir=tmp_path)
    with Engine.open(config) as engine:
        costs, size = engine.experts.costs, engine.experts.plan.slot_bytes
        assert costs.device == size / 10e9 and costs.copy == pytest.approx(5e-6 + size / 1e9)
