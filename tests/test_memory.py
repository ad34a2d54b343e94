"""Memory is reserved, cleared, given huge pages and placed as asked, and what the system refused is told."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys

import numpy as np
import pytest

import cpu_kernels
from hybrid.machine import hardware

MIB = 1 << 20
HUGE = 2 * MIB
GRANTED = pytest.mark.skipif(
    hardware.huge_pages(hardware.HUGE_PAGES) not in ("always", "madvise"), reason="this system grants no huge pages"
)


def bytes_of(arena: cpu_kernels.Arena) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * arena.size).from_address(arena.address))


def run(code: str) -> subprocess.CompletedProcess[str]:
    imports = "import ctypes, mmap, resource, cpu_kernels\n"
    return subprocess.run([sys.executable, "-c", imports + code], capture_output=True, text=True)


def test_an_arena_reads_as_zero_again_where_it_was_cleared() -> None:
    arena = cpu_kernels.Arena(1 << 20)
    memory = bytes_of(arena)
    assert not memory.any()
    for offset, size in ((0, 1 << 20), (100, 50), (5000, 100_000), (4096, 8192), (0, 0)):
        memory[...] = 1
        arena.clear(offset, size)
        assert not memory[offset : offset + size].any()
        assert memory.sum() == len(memory) - size


@pytest.mark.parametrize("act", ["clear", "use_huge"])
def test_ranges_outside_an_arena_are_refused_with_the_numbers(act) -> None:
    arena = cpu_kernels.Arena(MIB)
    for offset, size in ((MIB, 1), (10, MIB), (2 * MIB, 0)):
        with pytest.raises(IndexError, match=f"{size} bytes at {offset} are outside the arena of {MIB}"):
            getattr(arena, act)(offset, size)


@pytest.mark.parametrize("huge", [False, True])
def test_an_untouched_arena_costs_nothing(huge) -> None:
    used = "int(open('/proc/self/statm').read().split()[1]) * mmap.PAGESIZE"
    code = f"before = {used}; arena = cpu_kernels.Arena(1 << 40, {huge}); print({used} - before, arena.huge_bytes())"
    grown, in_huge_pages = map(int, run(code).stdout.split())
    assert grown < MIB and in_huge_pages == 0


@pytest.mark.parametrize("size", [1 << 62, (1 << 64) - 1])
def test_more_than_the_address_space_is_refused(size) -> None:
    with pytest.raises(MemoryError):
        cpu_kernels.Arena(size)


@pytest.mark.parametrize("offset", [-1, 4096])
def test_what_lies_beside_an_arena_cannot_be_touched(offset) -> None:
    code = "arena = cpu_kernels.Arena(100); ctypes.memset(arena.address + 99, 1, 1); print('inside', flush=True)\n"
    result = run(code + f"ctypes.memset(arena.address + ({offset}), 1, 1)")
    assert (result.stdout, result.returncode) == ("inside\n", -signal.SIGSEGV)


@GRANTED
def test_huge_pages_are_counted_for_each_arena_alone() -> None:
    arenas = [cpu_kernels.Arena(size * MIB, huge) for size, huge in ((16, True), (16, False), (5, True), (1, True))]
    for arena in arenas:
        bytes_of(arena)[...] = 1
    first, small, odd, tiny = (arena.huge_bytes() for arena in arenas)
    assert 0 < first <= 16 * MIB and first % HUGE == 0
    assert small == 0 and tiny == 0
    assert 0 < odd <= 4 * MIB
    assert arenas[0].address % HUGE == 0


@GRANTED
def test_a_part_of_an_arena_may_use_huge_pages() -> None:
    arena = cpu_kernels.Arena(32 * MIB)
    assert arena.use_huge(3 * MIB, 16 * MIB)
    assert arena.use_huge(0, MIB)  # holds no whole huge page: nothing is asked for
    memory = bytes_of(arena)
    memory[...] = 1
    assert 0 < arena.huge_bytes() <= 14 * MIB
    arena.clear(0, arena.size)
    assert arena.huge_bytes() == 0 and not memory.any()


def test_an_arena_works_where_the_system_denies_huge_pages() -> None:
    no_huge_pages = 41  # PR_SET_THP_DISABLE
    code = (
        f"assert ctypes.CDLL(None).prctl({no_huge_pages}, 1, 0, 0, 0) == 0\n"
        "arena = cpu_kernels.Arena(16 << 20, True); ctypes.memset(arena.address, 1, arena.size)\n"
        "print(arena.huge_bytes(), ctypes.string_at(arena.address + arena.size - 1, 1))"
    )
    result = run(code)
    assert result.stdout.split() == ["0", repr(b"\x01")], result.stderr


def policy_of(address: int) -> tuple[int, int]:
    """(mode, mask of nodes) of the page at `address`, asked of the system; skips where that is not allowed."""
    get_mempolicy, of_address, nodes = 239, 2, 1024
    mode, mask = ctypes.c_int(), (ctypes.c_ulong * (nodes // 64))()
    arguments = (ctypes.byref(mode), mask, nodes + 1, ctypes.c_ulong(address), of_address)
    if ctypes.CDLL(None, use_errno=True).syscall(get_mempolicy, *arguments) != 0:
        pytest.skip(f"memory policies cannot be read here (errno {ctypes.get_errno()})")
    return mode.value, mask[0]


def test_an_arena_prefers_the_node_that_was_asked_for() -> None:
    preferred = 1
    node = hardware.probe().nodes[0].id
    arena = cpu_kernels.Arena(MIB, node=node)
    assert policy_of(arena.address) == policy_of(arena.address + MIB - 1) == (preferred, 1 << node)
    assert arena.placed
    anywhere = cpu_kernels.Arena(MIB)
    assert policy_of(anywhere.address) == (0, 0)
    assert not anywhere.placed


@pytest.mark.parametrize("node", [1000, 1023, 1024, 1 << 30])
def test_a_node_that_is_not_there_is_told_and_the_memory_works(node) -> None:
    arena = cpu_kernels.Arena(MIB, huge=True, node=node)
    assert not arena.placed
    bytes_of(arena)[...] = 1
