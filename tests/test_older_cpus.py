"""Processors without AVX-512, and without AVX, run the same kernels and give the same text: emulated by qemu."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from rig import TRIED

ROOT = Path(__file__).parent.parent
QEMU = shutil.which("qemu-x86_64")
CPUS = {"Haswell": ["avx2", "portable"], "Nehalem": ["portable"]}  # instruction sets that each must find, best first

pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed; Debian's package is qemu-user")


def python(*arguments: str, cpu: str | None = None, **environment: str) -> str:
    """What a Python process prints, on an emulated processor or on this one."""
    command = [sys.executable, *arguments]
    if cpu:
        command = [str(QEMU), "-cpu", cpu, *command]
        environment["OPENBLAS_CORETYPE"] = cpu  # numpy's OpenBLAS misreads an emulated processor
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=7200
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.mark.parametrize("cpu", CPUS)
def test_the_processor_is_recognised(cpu) -> None:
    assert python("-c", "import cpu_kernels; print(*cpu_kernels.available_isas())", cpu=cpu).split() == CPUS[cpu]


def run_kernel_tests(cpu: str) -> str:
    """One case of each test: accuracy and all sizes are tried where the processor is not emulated."""
    best = CPUS[cpu][0]
    select = ("-k", best, "--ignore", "tests/kernels/test_accuracy.py", "tests/kernels")
    few = {"HYBRID_TEST_ISA": best, "HYBRID_TEST_BRIEF": "1"}
    return python("-m", "pytest", "-p", "no:cacheprovider", "-vv", *select, cpu=cpu, **few)


@pytest.fixture(scope="module")
def reports() -> Iterator[dict[str, Future[str]]]:
    """What the tests of the kernels print on each processor, side by side: each takes minutes, on one core."""
    with ThreadPoolExecutor() as pool:
        yield {cpu: pool.submit(run_kernel_tests, cpu) for cpu in CPUS}


@pytest.mark.parametrize("cpu", CPUS)
def test_the_kernels_pass_their_tests(reports, cpu) -> None:
    """Every kernel in every format."""
    best, report = CPUS[cpu][0], reports[cpu].result()
    for format in TRIED:
        assert f"test_moe.py::test_random_routing[{best}-{format}-1] PASSED" in report
    assert "SKIPPED" not in report


@pytest.mark.parametrize("cpu", CPUS)
def test_the_text_is_that_of_the_same_instruction_set_here(tmp_path, cpu) -> None:
    def generate(**choices: str) -> list[int]:
        arguments = ("--prompt", "Once upon a time", "--max-tokens", "16", "--json", "--cache-dir", str(tmp_path))
        report = json.loads(python("-m", "hybrid.main", *arguments, **choices))
        assert report["summary"]["isa"] == CPUS[cpu][0]
        return report["completions"][0]["token_ids"]

    if CPUS[cpu][0] not in python("-c", "import cpu_kernels; print(*cpu_kernels.available_isas())").split():
        pytest.skip(f"this machine lacks {CPUS[cpu][0]}")
    emulated = generate(cpu=cpu)
    assert len(emulated) > 1
    assert emulated == generate(HYBRID_ISA=CPUS[cpu][0])
