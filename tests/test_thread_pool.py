"""Threads share the cores of a machine with others: who sleeps is not waited for, and nobody has a core of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rig import BF16, ISAS, Rig, aligned, padded

import cpu_kernels
from hybrid.machine.meters import CoreMeter
from hybrid.serving.recorder import MUCH_WAITED, Recorder

ALLOWED = sorted(os.sched_getaffinity(0))


def threads() -> set[int]:
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


class Placed:
    """A pool whose threads have all run once, and the processors of those that it made."""

    def __init__(self, *arguments: object) -> None:
        before = threads()
        self.pool = cpu_kernels.ThreadPool(*arguments)
        cpu_kernels.phase_seconds(self.pool, 1)
        self.cpus = [sorted(os.sched_getaffinity(task)) for task in sorted(threads() - before)]


def test_threads_may_run_on_any_processor_of_theirs() -> None:
    assert Placed(3, []).cpus == [ALLOWED] * 2
    assert Placed(3, [ALLOWED]).cpus == [ALLOWED] * 2
    assert Placed(4, [ALLOWED[:1], ALLOWED[-1:]], 2).cpus == [ALLOWED[:1], ALLOWED[-1:], ALLOWED[-1:]]


@pytest.mark.parametrize("cpus", [[], [-1], [5000], [1 << 30]], ids=str)
def test_processors_that_are_not_there_leave_the_choice_to_the_system(cpus) -> None:
    assert Placed(2, [cpus]).cpus == [ALLOWED]


def test_the_caller_is_placed_while_a_step_runs_and_then_has_its_own_again() -> None:
    pool, seen = cpu_kernels.ThreadPool(2, [ALLOWED[-1:]]), []
    sizes = {"rows": 1, "sequences": 1, "positions": 1, "vocab": 1, "scratch_bytes": 0}
    executor, zero = cpu_kernels.Executor(isa=ISAS[0], pool=pool, **sizes), np.zeros(1, np.int32)
    executor.host(part=cpu_kernels.Part.place, call=lambda: seen.append(os.sched_getaffinity(0)))
    executor.step(zero, zero, zero, np.zeros(0, np.int32), np.zeros((0, 1), np.float32))
    assert (seen, os.sched_getaffinity(0)) == ([{ALLOWED[-1]}], set(ALLOWED))


class Sums:
    """Steps that double a matrix by products between callbacks, which sleep so long that all other threads do."""

    def __init__(self, threads: int, nodes: int = 1) -> None:
        self.rig = Rig(ISAS[0], rows=9, threads=threads, nodes=nodes)
        self.values = aligned((9, 64), np.float32, 1)
        rows, weight = padded(np.ones((9, 64), BF16)), aligned((4, 32, 16, 2), BF16, 1)
        self.callers: list[int] = []
        for _ in range(3):
            self.rig.add(
                "gemm", format=cpu_kernels.Format.bf16, input=rows, weight=weight, bias=None, output=self.values,
                columns=64, inputs=64, input_stride=rows.strides[0], output_stride=64, accumulate=True,
            )  # fmt: skip
            self.rig.executor.host(part=cpu_kernels.Part.place, call=self._pause)

    def _pause(self) -> None:
        self.callers.append(threading.get_ident())
        time.sleep(0.005)


@pytest.mark.parametrize(("threads", "nodes"), [(1, 1), (2, 1), (7, 1), (4, 2)])
def test_threads_that_fall_asleep_within_a_step_come_back(threads, nodes) -> None:
    sums = Sums(threads, nodes)
    for step in range(1, 4):
        sums.rig.run(9)
        assert (sums.values == 1 + step * 3 * 64).all()
    assert set(sums.callers) == {threading.get_ident()} and len(sums.callers) == 9


def test_many_pools_come_and_go_while_their_threads_wake_up() -> None:
    for _ in range(50):
        cpu_kernels.phase_seconds(cpu_kernels.ThreadPool(3, []), 2)
        cpu_kernels.ThreadPool(3, [])


def test_too_many_threads_for_the_counters_are_refused() -> None:
    with pytest.raises(ValueError, match="20000 threads; there must be at least one and at most 16383"):
        cpu_kernels.ThreadPool(20000, [])


def write(folder: Path, task: int, text: str) -> None:
    (folder / str(task)).mkdir(parents=True, exist_ok=True)
    (folder / str(task) / "schedstat").write_text(text)


def test_time_without_a_core_is_counted_over_all_threads(tmp_path) -> None:
    write(tmp_path, 1, "1000 9000 5\n")
    write(tmp_path, 2, "0 0 0\n")
    meter = CoreMeter(tmp_path)
    assert meter.waited() is None
    write(tmp_path, 1, "1300 9000 9\n")
    write(tmp_path, 2, "100 0 9\n")
    write(tmp_path, 3, "0 600 1\n")
    assert meter.waited() == 0.6
    write(tmp_path, 4, "nonsense\n")
    assert meter.waited() == 0.6
    assert CoreMeter(tmp_path / "absent").waited() is None


@pytest.mark.parametrize(("waited", "noted"), [(None, False), (0.0, False), (MUCH_WAITED, True), (0.9, True)])
def test_a_summary_says_that_cores_were_missing(waited, noted, monkeypatch) -> None:
    monkeypatch.setattr(CoreMeter, "waited", lambda self: waited)
    summary = Recorder().summary(0.0, "portable", 2)
    assert (f"waited {waited or 0:.0%} of the time for a core" in str(summary)) == noted


def test_a_thread_that_falls_asleep_late_is_woken(tmp_path) -> None:
    """The caller slept for ever where it fell asleep just while the other thread looked for sleepers."""
    if not (compiler := shutil.which(os.environ.get("CXX", "c++"))):
        pytest.skip("no compiler")
    root, program = Path(__file__).parent.parent, tmp_path / "sleep_stress"
    flags = ["-std=c++17", "-O1", "-pthread", "-I", root / "cpu_kernels" / "src"]
    subprocess.run([compiler, *flags, root / "tests" / "sanitize" / "sleep_stress.cpp", "-o", program], check=True)
    ended = subprocess.run([program], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
