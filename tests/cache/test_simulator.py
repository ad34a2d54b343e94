"""Replays, sweeps and the cost model."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from routing import random_trace

from gpu_cache import sweep as sweep_module
from gpu_cache.clock import CopyClock
from gpu_cache.costs import Machine, cpu_only, layer_seconds, predict, work_of
from gpu_cache.errors import CacheError
from gpu_cache.policies import POLICIES
from gpu_cache.simulator import SCHEDULES, Setting, drive, policy_names, replay
from gpu_cache.sweep import describe_trace, provenance, result_name, sweep
from gpu_cache.table import Table
from gpu_cache.trace import calls
from hybrid.lab.kept_results import KeptResults

TRACE = calls(random_trace(11, steps=80, layers=4, experts=8, top_k=2, tokens=2))
MACHINE = Machine(pcie_gbps=25, device_gbps=1000, cpu_gbps=100, expert_bytes=1e8, other_ms=2, layer_ms=0.1)


@cache
def bound_of(setting: Setting) -> int | None:
    return replay(TRACE, setting).upper_bound


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize(
    "setting", [{}, {"quota": 1}, {"delay": 5}, {"mapping": "hash"}, {"mapping": "prefix"}], ids=str
)
def test_counts_add_up_and_no_policy_beats_the_bound(policy: str, setting: dict) -> None:
    result = replay(TRACE, Setting(3, 4, policy, **setting))
    assert (result.calls == result.hits + result.loading + result.misses).all()
    assert result.calls.sum() == TRACE.total == result.groups.sum()
    assert np.array_equal(result.hits, TRACE.by_layer(result.found)) and (result.found <= result.groups).all()
    bound = bound_of(Setting(3, 4, "bypass-Belady", **setting))
    assert bound is not None
    if not policy.startswith("static"):  # a static placement does not begin empty
        assert 0 < result.hits.sum() <= bound


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("admission", ["always", "second-touch", "break-even"])
def test_belady_bounds_what_admits_at_once(policy: str, admission: str) -> None:
    setting = Setting(4, 4, policy, admission)
    hits = replay(TRACE, setting, MACHINE.costs).hits.sum()
    assert hits <= replay(TRACE, replace(setting, policy="bypass-Belady")).hits.sum()
    if admission == "always":
        bound = replay(TRACE, replace(setting, policy="Belady")).upper_bound
        assert bound is not None and hits <= bound


@pytest.mark.parametrize(
    ("setting", "bounded"),
    [({}, True), ({"quota": 9}, False), ({"delay": 1}, False), ({"nways": 3}, False)],
    ids=str,
)
def test_belady_is_called_a_bound_only_where_it_is_one(setting: dict, bounded: bool) -> None:
    result = replay(TRACE, replace(Setting(4, 4, "belady"), **setting))
    assert (result.upper_bound is not None) == bounded


def test_a_copy_that_takes_long_is_late_and_none_is_made_without_quota() -> None:
    late = replay(TRACE, Setting(4, 4, delay=7))
    assert late.loading.sum() > 0 and late.hits.sum() < replay(TRACE, Setting(4, 4)).hits.sum()
    starved = replay(TRACE, Setting(4, 4, quota=0))
    assert (starved.hits.sum(), starved.fills.sum(), starved.misses.sum()) == (0, 0, TRACE.total)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mapping", ["modulo", "hash", "prefix"])
@pytest.mark.parametrize(("admission", "quota"), [("always", None), ("second-touch", 1), ("break-even", 3)])
def test_a_replay_without_delay_is_the_table_and_the_clock(
    policy: str, mapping: str, admission: str, quota: int | None
) -> None:
    setting = Setting(3, 4, policy, admission, mapping, quota, seed=3)
    table = Table(setting.geometry(TRACE), policy, admission, quota, 3, MACHINE.costs)
    found = drive(TRACE, table, CopyClock(0))
    result = replay(TRACE, setting, MACHINE.costs)
    assert result.found.tolist() == found
    for name, counts in table.counts._asdict().items():
        assert np.array_equal(counts, getattr(result, name)), name


def test_values_that_outgrow_numbers_are_divided_and_choose_as_before() -> None:
    trace = calls(random_trace(5, steps=300, layers=1, experts=16, top_k=2))
    table, heavy = (Table(Setting(1, 6).geometry(trace), policy) for policy in ("LFU", "LFU"))
    heavy.policy._unit = 2.0**511  # type: ignore[attr-defined]  # 64 steps before all values are divided
    assert drive(trace, table, CopyClock(0)) == drive(trace, heavy, CopyClock(0))
    assert heavy.policy._unit < 2.0**10  # type: ignore[attr-defined]
    assert heavy.resident() == table.resident()


def test_a_replay_is_the_table_and_the_clock() -> None:
    setting = Setting(2, 6, "SIEVE", quota=3, delay=2)
    table = Table(setting.geometry(TRACE), "SIEVE", quota=3)
    drive(TRACE, table, CopyClock(2))
    table.check_integrity()
    result = replay(TRACE, setting)
    for name in ("calls", "hits", "loading", "misses", "fills", "evictions"):
        assert np.array_equal(getattr(table.counts, name), getattr(result, name)), name


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (Setting(0, 4), "0"),
        (Setting(4, 4, "MRU"), "'MRU'.*LRU.*bypass-Belady"),
        (Setting(4, 4, admission="never"), "'never'"),
        (Setting(4, 4, "Belady", mapping="random"), "'random'"),
        (Setting(4, 4, delay=-1), "-1"),
        (Setting(4, 4, quota=-1), "-1"),
        (Setting(4, 9), "36 slots"),
        (Setting(4, 4, admission="break-even"), "costs"),
    ],
)
def test_settings_that_no_cache_can_have_are_refused(setting: Setting, words: str) -> None:
    with pytest.raises(CacheError, match=words):
        sweep(TRACE, [Setting(4, 4), setting])


SETTINGS = [Setting(4, ways, policy) for ways in (3, 5) for policy in ("LRU", "Belady", "bypass-Belady", "static-best")]


def test_a_sweep_is_the_same_in_one_process_and_in_two() -> None:
    reports: list[tuple[int, int]] = []
    rows = sweep(TRACE, SETTINGS, MACHINE, workers=2, report=lambda *done: reports.append(done))
    assert rows == sweep(TRACE, SETTINGS, MACHINE)
    assert (
        reports[0] == (0, 8)
        and reports[-1] == (8, 8)
        and [row["policy"] for row in rows[:4]] == [setting.policy for setting in SETTINGS[:4]]
    )
    assert json.loads(json.dumps(rows)) == rows
    assert {"calls", "hits", "misses", "fills", "evictions", "nblocks", "nways", "slots"} <= set(rows[0])


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    path, replayed = tmp_path / "results.jsonl", []
    whole = sweep(TRACE, SETTINGS, MACHINE)
    real = replay
    monkeypatch.setattr(sweep_module, "replay", lambda *a: replayed.append(a[1]) or real(*a))
    sweep(TRACE, SETTINGS[:3], MACHINE, kept=KeptResults(path))
    with open(path, "a") as file:
        file.write('{"name": "cut o')
    for _ in range(2):
        assert sweep(TRACE, SETTINGS, MACHINE, kept=KeptResults(path)) == whole and replayed == SETTINGS
    assert sweep(TRACE, SETTINGS[:1], replace(MACHINE, cpu_gbps=50), kept=KeptResults(path)) != whole[:1]


def test_a_result_belongs_to_a_trace_a_setting_and_a_machine() -> None:
    other = calls(random_trace(12, steps=80, layers=4, experts=8, top_k=2, tokens=2))
    names = {
        result_name(digest, setting, machine)
        for digest in (TRACE.digest(), other.digest())
        for setting in (Setting(4, 4), Setting(4, 4, seed=1))
        for machine in (None, MACHINE)
    }
    assert len(names) == 8
    origin = provenance("1.2")
    assert origin["version"] == "1.2" and origin["machine"]["system"]
    assert describe_trace(TRACE)["digest"] == TRACE.digest()


def test_a_layer_takes_the_longer_of_device_and_cpu() -> None:
    """An expert takes 1 ms on the CPU, 0.1 ms on the device, 4 ms to copy."""
    found = layer_seconds(np.array([0, 2, 2]), np.array([2, 0, 1]), MACHINE)
    assert found == pytest.approx([2e-3, 0.3e-3, 1e-3])


def test_a_step_is_its_layers_and_what_copies_take_from_the_memory() -> None:
    result = replay(calls(random_trace(1, steps=10, layers=2, experts=4, top_k=2, sticky=1)), Setting(2, 2))
    assert (result.hits.sum(), result.fills.sum()) == (36, 4)
    prediction = predict(work_of(result), MACHINE)
    layers = (2 * 2e-3 + 18 * 0.3e-3 + 4 * 1e-3) / 10
    assert prediction.layers == pytest.approx(layers) and prediction.copy == pytest.approx(4 * 4e-3 / 10)
    assert prediction.tokens_per_second == pytest.approx(1 / (layers + 2e-3))
    slow_link = predict(work_of(result), replace(MACHINE, pcie_gbps=1))
    assert slow_link.step == slow_link.copy == pytest.approx(4 * 0.1 / 10)
    assert cpu_only(work_of(result), MACHINE).step == pytest.approx(4 * 1e-3 + 2e-3)


@pytest.mark.parametrize(
    ("name", "value"), [("pcie_gbps", 0), ("expert_bytes", -1), ("other_ms", -1), ("cpu_gbps", float("nan"))]
)
def test_machines_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(CacheError, match=name.replace("_", " ")):
        replace(MACHINE, **{name: value})


def test_schedules_have_the_names_of_policies() -> None:
    assert set(SCHEDULES) == {"Belady", "bypass-Belady", "static-best", "static-layers"} and not set(SCHEDULES) & set(
        POLICIES
    )
