"""The machine is described as this process may use it: affinity, cgroup limits, one processor a core."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cpu_kernels
from hybrid import hardware
from hybrid.errors import ConfigError, KernelError


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "200000\n"}, None),
    ],
    ids=str,
)
def test_cgroups_of_both_versions_limit_processors(tmp_path, files, quota) -> None:
    write(tmp_path, files)
    assert hardware.cpu_quota(tmp_path) == quota


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("cores", "quota", "omp", "threads"),
    [
        (8, None, None, 8),
        (8, None, "", 8),
        (8, 2.0, None, 2),
        (8, 1.5, None, 2),
        (8, 0.25, None, 1),
        (4, 16.0, None, 4),
        (8, None, "3", 3),
        (8, 2.0, "5", 5),
        (8, None, " 6 ", 6),
        (8, None, "4,2", 4),
    ],
)
def test_default_threads_follow_cores_quota_and_omp(cores, quota, omp, threads) -> None:
    assert hardware.default_threads(cores, quota, omp) == threads


@pytest.mark.parametrize("omp", ["0", "-1", "many", "1.5", ",2", " ", "²", "99999"])
def test_a_bad_omp_num_threads_is_named(omp) -> None:
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS") as error:
        hardware.default_threads(8, None, omp)
    assert repr(omp) in str(error.value)


@pytest.mark.parametrize(
    ("siblings", "allowed", "cpus"),
    [
        (["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"], set(range(8)), (0, 1, 2, 3)),
        (["0-1", "0-1", "2-3", "2-3"], {0, 1, 2, 3}, (0, 2)),
        (["0-1", "0-1", "2-3", "2-3"], {1, 2, 3}, (1, 2)),
        (["0-1", "0-1", "2-3", "2-3"], {3}, (3,)),
        ([], {5, 2, 9}, (2, 5, 9)),
    ],
    ids=str,
)
def test_one_processor_a_core_is_taken_of_those_allowed(tmp_path, siblings, allowed, cpus) -> None:
    write(tmp_path, {f"cpu{i}/topology/thread_siblings_list": f"{text}\n" for i, text in enumerate(siblings)})
    assert hardware.physical_cpus(allowed, tmp_path) == cpus


def test_the_affinity_of_the_process_counts(monkeypatch) -> None:
    one = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {one})
    found = hardware.probe()
    assert (found.cpus, found.default_threads) == ((one,), 1)


def test_a_cgroup_limits_memory_but_its_page_cache_counts_as_free(tmp_path, monkeypatch) -> None:
    total, available = hardware.memory()
    assert 0 < available <= total
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    write(tmp_path, {"memory.max": "max\n"})
    assert hardware.memory()[0] >= total
    limit = 1 << 29
    write(
        tmp_path,
        {"memory.max": f"{limit}\n", "memory.current": "300000000\n", "memory.stat": "anon 1\nfile 100000000\n"},
    )
    assert hardware.memory() == (limit, limit - 200_000_000)


def test_the_best_instruction_set_is_taken_unless_one_is_forced(monkeypatch) -> None:
    usable = tuple(cpu_kernels.available_isas())
    assert (hardware.probe().isa, hardware.probe().isas) == (usable[0], usable)
    assert hardware.probe("portable").isa == "portable"
    monkeypatch.setenv("HYBRID_ISA", "portable")
    assert hardware.probe().isa == "portable"
    assert hardware.probe(usable[0]).isa == usable[0]
    monkeypatch.setenv("HYBRID_ISA", "")
    assert hardware.probe().isa == usable[0]


def test_an_unknown_instruction_set_is_refused_with_the_known_ones(monkeypatch) -> None:
    monkeypatch.setenv("HYBRID_ISA", "sse9")
    with pytest.raises(
        KernelError, match="'sse9' is unknown; known: avx512_bf16, avx512, avx2, portable; .*HYBRID_ISA"
    ):
        hardware.probe()


def test_a_missing_instruction_set_is_refused_with_the_missing_features(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "missing_features", lambda isa: ["avx512f", "avx512bw"])
    with pytest.raises(KernelError, match="'avx512' needs avx512f, avx512bw, .* usable: avx2, portable"):
        hardware.choose_isa("avx512", ("avx2", "portable"))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_missing_features_are_those_the_processor_does_not_list(isa) -> None:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    missing = cpu_kernels.missing_features(isa)
    assert (not missing) == (isa in cpu_kernels.available_isas())
    assert not set(missing) & set(flags)
