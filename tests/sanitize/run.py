"""Run the kernels, the executor and the thread pool under the checkers of the compiler: `make sanitize`.

Out-of-bounds accesses and undefined behaviour (ASan, UBSan): the extension is built with HYBRID_SANITIZE into
build/sanitize; there planted.py, a mistake, must be found, and then the tests of kernels, executor and memory pass.
Races (TSan): pool_stress.cpp and placed_stress.cpp, programs of their own, because a checked extension in an unchecked
Python would be reported for what Python does.

Ends with 1 if anything is found. A compiler that lacks a checker is told, and that part skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cpu_kernels

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "sanitize"
SOURCES = ROOT / "cpu_kernels" / "src"
COMPILER = os.environ.get("CXX", "c++")
TESTS = ("tests/kernels", "tests/test_executor.py", "tests/test_memory.py", "tests/test_hostile.py")
# What enters no code that others do not: sums with many roundings, and every pair of formats.
LEFT_OUT = ("--ignore=tests/kernels/test_accuracy.py", "-k", "not may_have_another_format")
PLANTED = Path(__file__).parent / "planted.py"
STRESS_SOURCES = ("cpu/thread_pool.cpp", "cpu/memory.cpp", "executor/*.cpp", "instances/portable.cpp")
STRESS_PROGRAMS = ("pool_stress", "placed_stress")
ISAS = tuple(dict.fromkeys(("portable", cpu_kernels.available_isas()[0])))  # each takes a minute to compile
# Python keeps small objects in pools of its own, in which nobody sees an overflow. What it never frees is no leak of
# ours. Tests look at what happens beyond an arena: that signal must stay theirs.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "PYTHONMALLOC": "malloc",
}


def main() -> int:
    """0 if nothing was found."""
    BUILD.mkdir(parents=True, exist_ok=True)
    parts = {"address,undefined": check_tests, "thread": check_threads}
    failed = [flags for flags, check in parts.items() if supported(flags) and not check()]
    if failed:
        print(f"failed: -fsanitize={', -fsanitize='.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def supported(flags: str) -> bool:
    """Whether a program with these checks can be built and run here; says so if not."""
    program = BUILD / "empty"
    command = [COMPILER, f"-fsanitize={flags}", "-x", "c++", "-", "-o", str(program)]
    built = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    ran = built.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0
    if not ran or ("address" in flags and not library("libasan.so").is_absolute()):
        print(f"{COMPILER} has no -fsanitize={flags} that runs here: these checks are skipped", flush=True)
        return False
    return True


def library(name: str) -> Path:
    """Where the compiler keeps it, or its bare name."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True)
    return Path(found.stdout.strip())


def check_tests() -> bool:
    """Whether the extension could be built and all its tests pass."""
    site = BUILD / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--target", str(site), "."]
    settings = {
        "cmake.define.HYBRID_SANITIZE": "address,undefined",
        "cmake.define.HYBRID_SANITIZE_ISAS": ";".join(ISAS),
        "build-dir": str(BUILD / "cmake"),
    }
    built = succeeds([*install, *(f"--config-settings={k}={v}" for k, v in settings.items())])
    return built and all(finds_mistake(site, isa) for isa in ISAS) and run_tests(site)


def finds_mistake(site: Path, isa: str) -> bool:
    """Whether a planted one is reported: else the checks do not reach the kernels."""
    command = python_command(site, f"import runpy; runpy.run_path({str(PLANTED)!r}, run_name='__main__')")
    run = subprocess.run(command, cwd=ROOT, env=checked_environment(site, isa), capture_output=True, text=True)
    found = run.returncode != 0 and "heap-buffer-overflow" in run.stderr
    print(f"{isa}: a planted overflow is " + ("found" if found else f"missed\n{run.stderr}"), flush=True)
    return found


def succeeds(command: list[str], **more: str) -> bool:
    """Whether it ends with 0: neither with an error nor by a signal. more: of its environment."""
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **more}).returncode == 0


def run_tests(site: Path) -> bool:
    """The instruction sets side by side: checked code is slow, and a test runs on one core."""
    runs = [
        subprocess.Popen(
            pytest_command(site), cwd=ROOT, env=checked_environment(site, isa), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for isa in ISAS
    ]  # fmt: skip
    for isa, run in zip(ISAS, runs, strict=True):
        print(f"{isa}, ASan and UBSan:\n{run.communicate()[0]}", flush=True)
    return all(run.returncode == 0 for run in runs)


def python_command(site: Path, code: str) -> list[str]:
    """Python on the checked extension. Without `site` (-S): it would put the one of the environment first."""
    paths = [str(site), *(path for path in sys.path if path.endswith("site-packages"))]
    return [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths}; {code}"]


def pytest_command(site: Path) -> list[str]:
    # What a checker writes before it ends the process must not wait to be shown with the test.
    arguments = ["-x", "-q", "--capture=sys", "-p", "no:cacheprovider", *LEFT_OUT, *TESTS, *sys.argv[1:]]
    return [*python_command(site, "import pytest; sys.exit(pytest.main(sys.argv[1:]))"), *arguments]


def checked_environment(site: Path, isa: str) -> dict[str, str]:
    """ASan must be there before Python, and what throws exceptions before ASan looks for it."""
    preload = " ".join(str(library(name)) for name in ("libasan.so", "libstdc++.so"))
    paths = {"LD_PRELOAD": preload, "PYTHONPATH": str(site), "HYBRID_TEST_ISA": isa}
    return {**os.environ, **ENVIRONMENT, **paths}


def check_threads() -> bool:
    """Whether the stress programs can be built and find nothing. What they share is compiled once."""
    shared = [path for pattern in STRESS_SOURCES for path in sorted(SOURCES.glob(pattern))]
    programs = [PLANTED.with_name(f"{name}.cpp") for name in STRESS_PROGRAMS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(checked_object, shared + programs))
    count = len(shared)
    return None not in objects and all(check_program(main, objects[:count]) for main in objects[count:])


def checked_object(source: Path) -> Path | None:
    """Compiled to find races; None if it cannot be."""
    made = BUILD / f"{source.stem}.o"
    flags = ["-std=c++17", "-march=x86-64-v2", "-O1", "-g1", "-fsanitize=thread", "-pthread", f"-I{SOURCES}"]
    return made if succeeds([COMPILER, *flags, "-c", str(source), "-o", str(made)]) else None


def check_program(main: Path, shared: list[Path]) -> bool:
    """Whether a stress program can be linked and finds nothing."""
    program = main.with_suffix("")
    link = [COMPILER, "-fsanitize=thread", "-pthread", *map(str, (main, *shared)), "-o", str(program)]
    return succeeds(link) and succeeds([str(program)], **ENVIRONMENT)


if __name__ == "__main__":
    sys.exit(main())
