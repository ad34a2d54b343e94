"""The machine is described as this process may use it: affinity, one processor a core."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cpu_kernels
from hybrid.errors import ConfigError, KernelError
from hybrid.machine import hardware


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


def nodes_of(folder: Path, cpus: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    return [(node.id, node.cpus) for node in hardware.memory_nodes(cpus, folder)]


@pytest.mark.parametrize(
    ("lists", "cpus", "nodes"),
    [
        ({0: "0-3", 1: "4-7"}, (0, 1, 2, 3, 4, 5, 6, 7), [(0, (0, 1, 2, 3)), (1, (4, 5, 6, 7))]),
        ({0: "0-1,4-5", 1: "2-3,6-7"}, (0, 1, 2, 3), [(0, (0, 1)), (1, (2, 3))]),
        ({0: "0,2,4-5", 1: "1,3"}, (0, 1, 5), [(0, (0, 5)), (1, (1,))]),
        ({0: "0-3", 1: "4-7"}, (5, 6), [(1, (5, 6))]),
        ({0: "0-1", 1: ""}, (0, 1), [(0, (0, 1))]),
        ({10: "2", 2: "1", 1: "0"}, (0, 1, 2), [(1, (0,)), (2, (1,)), (10, (2,))]),
        ({0: "0-1"}, (0, 1, 2), [(0, (0, 1, 2))]),
        ({}, (3, 5), [(0, (3, 5))]),
    ],
    ids=str,
)
def test_processors_are_sorted_by_memory_node(tmp_path, lists, cpus, nodes) -> None:
    write(tmp_path, {f"node{i}/cpulist": f"{text}\n" for i, text in lists.items()})
    write(tmp_path, {"online": "0-1\n", "has_cpu": "0\n"})
    assert nodes_of(tmp_path, cpus) == nodes


def test_this_machine_has_its_processors_in_nodes() -> None:
    found = hardware.probe()
    assert sorted(cpu for node in found.nodes for cpu in node.cpus) == list(found.cpus)


MANY = tuple(hardware.MemoryNode(i, tuple(range(10 * i, 10 * i + size))) for i, size in enumerate((4, 4, 3)))


@pytest.mark.parametrize(
    ("nodes", "threads", "fit"),
    [
        (MANY[:1], 3, True),
        (MANY[:2], 8, True),
        (MANY[:2], 5, True),
        (MANY, 8, True),
        (MANY, 11, False),
        (MANY[:2], 9, False),
    ],
)
def test_threads_are_placed_among_the_processors_of_their_node(nodes, threads, fit) -> None:
    placed = hardware.place_threads(nodes, threads)
    assert placed == (tuple(node.cpus for node in nodes) if fit else ())
    pool = cpu_kernels.ThreadPool(threads, placed, len(nodes))
    runs = [[pool.node_of(thread) for thread in range(threads)].count(node) for node in range(len(nodes))]
    assert fit == all(run <= len(node.cpus) for run, node in zip(runs, nodes, strict=True))


@pytest.mark.parametrize(("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1), "0-1"), ((8, 0, 1, 2, 5), "0-2,5,8")])
def test_processors_are_written_as_the_system_writes_them(numbers, text) -> None:
    assert hardware.ranges_text(numbers) == text
    assert hardware._number_set(text) == set(numbers)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never\n", "always"),
        ("always madvise [never]\n", "never"),
        ("", "unsupported"),
        (None, "unsupported"),
    ],
)
def test_the_systems_rule_for_huge_pages_is_read(tmp_path, text, found) -> None:
    path = tmp_path / "enabled"
    if text is not None:
        path.write_text(text)
    assert hardware.huge_pages(path) == found


def test_the_affinity_of_the_process_counts(monkeypatch) -> None:
    one = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {one})
    found = hardware.probe()
    assert (found.cpus, found.default_threads) == ((one,), 1)
    assert [node.cpus for node in found.nodes] == [(one,)]


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
        KernelError, match="'sse9' is unknown; known: amx, avx512_bf16, avx512, avx2, portable; .*HYBRID_ISA"
    ):
        hardware.probe()


def test_a_missing_instruction_set_is_refused_with_the_missing_features(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "missing_features", lambda isa: ["avx512f", "avx512bw"])
    with pytest.raises(KernelError, match="'avx512' needs avx512f, avx512bw, .* usable: avx2, portable"):
        hardware.choose_isa("avx512", ("avx2", "portable"))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_missing_features_are_those_the_processor_does_not_list(isa) -> None:
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    missing = cpu_kernels.missing_features(isa)
    assert (not missing) == (isa in cpu_kernels.available_isas())
    assert not set(missing) & set(flags)


def test_tiles_that_the_kernel_refuses_are_absent() -> None:
    """Of what AMX needs only the permission is no processor flag: it is named alone, where all flags are there."""
    missing = cpu_kernels.missing_features("amx")
    assert "amx_permission" not in missing or missing == ["amx_permission"]
