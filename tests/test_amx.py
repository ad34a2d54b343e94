"""The kernels that ship, on an emulated processor with AMX. Skipped where the emulator is not.

Products are left to `tests/kernels` where this processor has the instructions itself.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from amx import emulator

import cpu_kernels

PROGRAMS = Path(__file__).parent / "amx"
ISAS = ["avx512_bf16", "amx"]  # those whose kernels run there
# The ops of which an instruction set with tiles has some use for them, as they are called in the object file.
TILE_OPS = {
    "attend": 6, "attend_seen": 3, "gemm_rows": 7, "head_gemm_rows": 7, "gate_up_set": 7, "down_routed": 7,
    "down_run": 7, "index_scores": 1, "entry_scores": 1, "block_scores": 1, "multiply_in_tiles": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def machine() -> None:
    try:
        emulator.require()
    except emulator.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def kernels(machine, tmp_path_factory) -> Callable[[str], Path]:
    """The object file of an instruction set, compiled when it is asked for."""
    folder = tmp_path_factory.mktemp("kernels")
    return cache(lambda isa: emulator.compile_kernels(isa, folder))


def only_emulated(isa: str) -> None:
    if isa in cpu_kernels.available_isas():
        pytest.skip(f"this processor has {isa}: tests/kernels try it")


@pytest.mark.usefixtures("machine")
def test_tiles_multiply_as_documented_and_show_when_left_configured() -> None:
    emulator.run(PROGRAMS / "tiles.cpp")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("program", ["kernels", "attention"])
def test_every_product_is_right(program, isa, kernels) -> None:
    only_emulated(isa)
    emulator.run(PROGRAMS / f"{program}.cpp", isa, [kernels(isa)], [f"KERNELS=kernels_{isa}"])


def test_bits_depend_neither_on_rows_nor_where_sums_are_exact_on_tiles(kernels) -> None:
    only_emulated("amx")
    emulator.run(PROGRAMS / "agreement.cpp", "amx", [kernels(isa) for isa in ISAS])


def test_tiles_are_configured_once_where_an_op_begins_and_released_where_it_ends(kernels) -> None:
    """By the instructions that the kernels consist of: what multiplies tiles neither configures nor releases them."""
    configured, released, multiply = Counter(), Counter(), set()
    for name, instructions in functions(kernels("amx")).items():
        configured[name] += instructions.count("ldtilecfg")
        released[name] += instructions.count("tilerelease")
        if any(instruction.startswith("tdp") for instruction in instructions):
            multiply.add(name)
    assert +configured == TILE_OPS
    assert +released == TILE_OPS
    assert multiply - set(TILE_OPS) == {"strip_passes", "small_pass"}


def functions(kernels: Path) -> dict[str, list[str]]:
    """The instructions of every function of an object file, those of all instances of a template together."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(kernels)]
    found: dict[str, list[str]] = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if function := re.fullmatch(r"[0-9a-f]+ <(?:.* )?hybrid::\w+::(\w+)(?:<.*>)?\(.*\).*>:", line):
            instructions = found.setdefault(function[1], [])
        elif match := re.match(r" +[0-9a-f]+:\t(\w+)", line):
            instructions.append(match[1])
    return found


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return false;", "FAIL"),
        ('asm volatile("ud2"); return true;', "processor exception 6 "),
        ('asm volatile("tdpbssd %tmm2, %tmm1, %tmm0"); return true;', "processor exception 6 "),  # no tiles configured
        ("return *reinterpret_cast<volatile char*>(1L << 40);", "processor exception 14 "),
        ("return undeclared;", "undeclared"),
    ],
)
def test_a_program_that_goes_wrong_is_reported(tmp_path, body, reason) -> None:
    """Else the tests above could not fail."""
    program = tmp_path / "wrong.cpp"
    program.write_text(f'#include "bare.h"\nbool check() {{ {body} }}\n')
    with pytest.raises(emulator.Failed, match=reason):
        emulator.run(program)


def test_flags_are_those_that_ship() -> None:
    flags = emulator.kernel_flags("avx512_bf16")
    assert {"-O3", "-ffp-contract=off", "-mfma", "-mavx512f", "-mavx512bf16"} <= set(flags)
    assert {*flags, "-mamx-tile", "-mamx-int8"} <= set(emulator.kernel_flags("amx"))
    assert not any("$" in flag for flag in flags)
    with pytest.raises(emulator.Failed, match="'sse9'"):
        emulator.kernel_flags("sse9")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("sources.list.d/debian.sources", "Types: deb\nURIs: http://archive.example/debian\nSuites: bookworm\n"),
        (
            "sources.list",
            "deb http://a.example/debian-security x main\ndeb http://archive.example/debian x main\n",
        ),
        ("sources.list", "deb [arch=amd64 signed-by=/a] http://archive.example/debian x main\n"),
    ],
)
def test_the_emulator_is_taken_from_where_this_machine_takes_its_packages(tmp_path, file, text) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert emulator.mirror(tmp_path) == "http://archive.example/debian"


def test_a_machine_that_is_not_debian_is_told_so(tmp_path) -> None:
    with pytest.raises(emulator.Unavailable, match="no Debian archive"):
        emulator.mirror(tmp_path)
