"""The control groups of this process limit its memory and its processors, wherever they are mounted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hybrid.commands.run import app
from hybrid.config import EngineConfig
from hybrid.errors import HybridError
from hybrid.machine import hardware
from hybrid.machine.cgroup import ControlGroups, control_groups
from hybrid.plan.resolve import plan_model
from hybrid.plan.text import plan_text

GIB, MIB = 1 << 30, 1 << 20
MACHINE = {"MemTotal": 64 * GIB, "MemAvailable": 48 * GIB}
NEVER = 9223372036854771712  # version 1 says so that there is no limit
UNIFIED = "0::"


class Tree:
    """A made-up machine: groups below a folder, and what the system tells of a process there."""

    def __init__(self, root: Path) -> None:
        self.root, self.proc = root, root / "proc"
        self._write("meminfo", "".join(f"{name}: {size // 1024} kB\n" for name, size in MACHINE.items()))
        self._write("proc/mountinfo", f"25 1 0:24 / {root} rw - ext4 /dev/vda rw\n\n30 25\n")
        self._write("proc/cgroup", "")

    def mount(self, folder: str, controllers: str = "", top: str = "/") -> Tree:
        """controllers: of version 1; none: version 2. top: the group that is seen there."""
        kind = f"cgroup cgroup rw,{controllers}" if controllers else "cgroup2 cgroup rw,nsdelegate"
        place = str(self.root / folder).replace(" ", "\\040")
        return self._append("proc/mountinfo", f"31 25 0:26 {top} {place} rw,relatime shared:9 - {kind}\n")

    def own(self, *lines: str) -> Tree:
        """lines: "0::/path", or "4:memory:/path" in version 1."""
        return self._append("proc/cgroup", "".join(f"{line}\n" for line in lines))

    def group(self, folder: str, **files: Any) -> Tree:
        """files: by name, with a `_` for the dot of version 2; a dictionary is a line per entry."""
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            name = name.replace("_", ".", 1)
            lines = [f"{key} {number}" for key, number in value.items()] if isinstance(value, dict) else [str(value)]
            self._write(f"{folder}/{name}", "\n".join(lines) + "\n")
        return self

    def groups(self) -> ControlGroups:
        return control_groups(self.proc)

    def memory(self) -> tuple[float, float, str | None]:
        """What may be used, what is left, and by which file below the root."""
        found = hardware.memory(self.proc, self.root / "meminfo", self.root / "nodes")
        return found.total, found.available, found.limit and found.limit.file.removeprefix(f"{self.root}/")

    def processors(self) -> float | None:
        found = self.groups().cpu_limit()
        return found and found.amount

    def _write(self, name: str, text: str) -> Tree:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)
        return self

    def _append(self, name: str, text: str) -> Tree:
        return self._write(name, (self.root / name).read_text() + text)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


NOTHING = (64 * GIB, 48 * GIB, None)


def test_without_groups_the_machine_is_what_there_is(tree: Tree) -> None:
    assert (tree.memory(), tree.processors()) == (NOTHING, None)
    assert control_groups(tree.root / "absent") == ControlGroups((), ())


@pytest.mark.parametrize(
    ("limited", "left"),
    [
        ("sys/user.slice/run-1.scope", 3 * GIB),
        ("sys/user.slice", 2 * GIB),  # others in it have taken some
    ],
)
def test_the_group_of_the_process_and_those_above_it_count(tree: Tree, limited: str, left: int) -> None:
    """Version 2: systemd-run, Slurm, a login session."""
    tree.mount("sys").own(UNIFIED + "/user.slice/run-1.scope")
    tree.group("sys", cpu_stat={}).group("sys/user.slice", memory_max="max", memory_current=2 * GIB)
    tree.group("sys/user.slice/run-1.scope", memory_max="max", memory_current=GIB)
    assert tree.memory() == NOTHING
    tree.group(limited, memory_max=4 * GIB)
    assert tree.memory() == (4 * GIB, left, f"{limited}/memory.max")


def test_the_smallest_rest_on_the_way_up_decides(tree: Tree) -> None:
    """A big group that is nearly full leaves less than a small one that is empty."""
    tree.mount("sys").own(UNIFIED + "/pod/box")
    tree.group("sys/pod", memory_max=8 * GIB, memory_current=7 * GIB)
    tree.group("sys/pod/box", memory_max=2 * GIB, memory_current=100 * MIB)
    assert tree.memory() == (2 * GIB, GIB, "sys/pod/memory.max")


def test_a_machine_that_is_full_leaves_less_than_a_group(tree: Tree) -> None:
    tree.mount("sys").own(UNIFIED + "/box").group("sys/box", memory_max=60 * GIB, memory_current=0)
    assert tree.memory()[:2] == (60 * GIB, 48 * GIB)


def test_what_is_above_memory_high_is_slowed_down(tree: Tree) -> None:
    tree.mount("sys").own(UNIFIED + "/box")
    tree.group("sys/box", memory_max=4 * GIB, memory_high=3 * GIB, memory_current=GIB)
    assert tree.memory() == (3 * GIB, 2 * GIB, "sys/box/memory.high")


def test_file_cache_is_free_and_shared_memory_is_not(tree: Tree) -> None:
    stat = {"anon": 0, "file": 3 * GIB, "shmem": GIB, "active_file": GIB, "inactive_file": GIB, "slab_reclaimable": 0}
    tree.mount("sys").own(UNIFIED + "/box").group("sys/box", memory_max=4 * GIB, memory_current=3 * GIB)
    assert tree.memory()[1] == GIB
    tree.group("sys/box", memory_stat=stat)
    assert tree.memory()[1] == 3 * GIB


def test_swap_is_no_memory(tree: Tree) -> None:
    tree.mount("sys").own(UNIFIED + "/box")
    tree.group("sys/box", memory_max=GIB, memory_current=2 * GIB, memory_swap={"max": 1})
    assert tree.memory() == (GIB, 0, "sys/box/memory.max")


def version_1(tree: Tree, path: str, top: str = "/") -> Tree:
    """The layout of many clusters: a mount for each controller, version 2 beside them without any."""
    tree.mount("sys/cpu,cpuacct", "cpu,cpuacct", top).mount("sys/memory", "memory", top).mount("sys/unified")
    tree.mount("sys/systemd", "name=systemd")
    return tree.own(f"9:name=systemd:{path}", f"4:memory:{path}", f"2:cpu,cpuacct:{path}", UNIFIED + "/init.scope")


def test_version_1_limits_memory_and_processors(tree: Tree) -> None:
    version_1(tree, "/slurm/job_7/step_0")
    tree.group("sys/memory", memory_limit_in_bytes=NEVER, memory_usage_in_bytes=20 * GIB)
    tree.group("sys/memory/slurm/job_7", memory_limit_in_bytes=4 * GIB, memory_usage_in_bytes=2 * GIB)
    tree.group("sys/memory/slurm/job_7/step_0", memory_limit_in_bytes=NEVER, memory_usage_in_bytes=GIB)
    tree.group("sys/cpu,cpuacct/slurm/job_7", cpu_cfs_quota_us=150000, cpu_cfs_period_us=100000)
    tree.group("sys/cpu,cpuacct/slurm/job_7/step_0", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    assert tree.memory() == (4 * GIB, 2 * GIB, "sys/memory/slurm/job_7/memory.limit_in_bytes")
    assert tree.processors() == 1.5


def test_version_1_counts_the_cache_of_all_groups_below(tree: Tree) -> None:
    stat = {"cache": 0, "inactive_file": 0, "total_cache": 3 * GIB, "total_inactive_file": GIB, "total_active_file": 0}
    version_1(tree, "/box").group("sys/memory/box", memory_limit_in_bytes=4 * GIB, memory_usage_in_bytes=3 * GIB)
    tree.group("sys/memory/box", memory_stat=stat)
    assert tree.memory()[1] == 2 * GIB


def test_version_1_says_what_groups_allow_that_are_not_visible(tree: Tree) -> None:
    version_1(tree, "/kubepods/pod/box", top="/kubepods/pod/box")
    tree.group("sys/memory", memory_limit_in_bytes=NEVER, memory_usage_in_bytes=GIB)
    tree.group("sys/memory", memory_stat={"hierarchical_memory_limit": 2 * GIB, "total_inactive_file": 0})
    assert tree.memory() == (2 * GIB, GIB, "sys/memory/memory.stat")


def test_version_1_may_leave_out_what_is_below_a_group(tree: Tree) -> None:
    version_1(tree, "/outer/inner").group("sys/memory/outer/inner", memory_limit_in_bytes=8 * GIB)
    tree.group("sys/memory/outer", memory_limit_in_bytes=GIB, memory_use_hierarchy=0)
    assert tree.memory()[0] == 8 * GIB
    tree.group("sys/memory/outer", memory_use_hierarchy=1)
    assert tree.memory()[0] == GIB


@pytest.mark.parametrize(
    ("path", "top"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/1a2b", "/docker/1a2b"),  # that of the host, and its own group mounted
        ("/system.slice/docker-1a2b.scope", "/elsewhere"),  # whatever is mounted is all that can be seen
        ("/", "/../.."),  # mounted before it entered its namespace
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_container_finds_its_group_at_the_mount(tree: Tree, path: str, top: str, version: int) -> None:
    if version == 1:
        version_1(tree, path, top).group("sys/memory", memory_limit_in_bytes=GIB)
        tree.group("sys/cpu,cpuacct", cpu_cfs_quota_us=50000, cpu_cfs_period_us=100000)
    else:
        tree.mount("sys", top=top).own(UNIFIED + path).group("sys", memory_max=GIB, cpu_max="50000 100000")
    assert (tree.memory()[0], tree.processors()) == (GIB, 0.5)


def test_a_mount_of_another_group_does_not_count(tree: Tree) -> None:
    """A monitor sees its own group and that of a neighbour; one that was moved out of its namespace sees no group."""
    tree.mount("sys").mount("other", top="/neighbour").own(UNIFIED + "/box").group("sys/box", memory_max=8 * GIB)
    tree.group("other", memory_max=GIB)
    assert tree.memory()[0] == 8 * GIB
    outside = Tree(tree.root / "outside").mount("sys").own(UNIFIED + "/../box").group("sys", memory_max=GIB)
    assert outside.memory() == NOTHING


def test_the_host_beside_the_own_mount_shows_the_groups_above(tree: Tree) -> None:
    tree.mount("sys", top="/pod/box").mount("host/sys").own(UNIFIED + "/pod/box")
    tree.group("sys", memory_max=8 * GIB).group("host/sys/pod", memory_max=2 * GIB)
    assert tree.memory()[0] == 2 * GIB


def test_a_group_that_was_removed_leaves_those_above_it(tree: Tree) -> None:
    tree.mount("sys").own(UNIFIED + "/slice/gone (deleted)").group("sys/slice", memory_max=GIB, cpu_max="max 100000")
    assert (tree.memory()[0], tree.processors()) == (GIB, None)


def test_spaces_in_a_path_are_written_as_numbers(tree: Tree) -> None:
    tree.mount("my groups").own(UNIFIED + "/a b").group("my groups/a b", memory_max=GIB)
    assert tree.memory()[0] == GIB


@pytest.mark.parametrize("text", ["", "nonsense", "-1", "max", "1e9", "²", "9" * 30])
def test_what_is_no_number_limits_nothing(tree: Tree, text: str) -> None:
    tree.mount("sys").own(UNIFIED + "/box", "nonsense").group("sys/box", memory_max=text, cpu_max=f"{text} 0 {text}")
    tree.group("sys/box", memory_stat={"file": text}, cpu_cfs_quota_us=text, cpu_cfs_period_us=text)
    assert (tree.memory(), tree.processors()) == (NOTHING, None)


@pytest.mark.parametrize(
    ("quotas", "processors"),
    [
        (("max 100000", "max 100000"), None),
        (("150000 100000", "max 100000"), 1.5),
        (("50000 100000", "400000 100000"), 0.5),
        (("400000 100000", "5000 20000"), 0.25),
    ],
)
def test_the_smallest_quota_on_the_way_up_decides(tree: Tree, quotas: tuple[str, str], processors: float) -> None:
    tree.mount("sys").own(UNIFIED + "/a/b")
    tree.group("sys/a", cpu_max=quotas[0]).group("sys/a/b", cpu_max=quotas[1])
    assert tree.processors() == processors


def test_memory_nodes_that_are_forbidden_do_not_count(tree: Tree) -> None:
    """A cpuset: processors are in the affinity already, memory is not."""
    for node, total in enumerate((32, 32, 0)):
        lines = {"MemTotal": total * GIB, "MemFree": GIB, "Active(file)": GIB, "Inactive(file)": 2 * GIB}
        tree.group(f"nodes/node{node}")._write(
            f"nodes/node{node}/meminfo",
            "".join(f"Node {node} {key}:  {size // 1024} kB\n" for key, size in lines.items()) + f"Node {node} X: 0\n",
        )
    for allowed, found in (("0-1", NOTHING), ("1", (32 * GIB, 4 * GIB)), ("", NOTHING)):
        tree._write("proc/status", f"Name:\tx\nMems_allowed_list:\t{allowed}\n")
        assert tree.memory()[: len(found)] == found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ({"MemTotal": 8, "MemFree": 1, "Active(file)": 2, "Inactive(file)": 1, "SReclaimable": 1}, (8, 5)),
        ({"MemTotal": 8, "MemFree": 3}, (8, 3)),
        ({"MemTotal": 8, "MemFree": 0}, (8, 0)),
        ({"MemTotal": 4, "MemAvailable": 6}, (4, 4)),
        ({"MemTotal": 8, "MemAvailable": 0, "MemFree": 1}, (8, 0)),
        ({"MemFree": 3}, (16, 3)),
        ({}, (16, 2)),
    ],
)
def test_memory_is_known_where_the_system_leaves_out_lines(tree: Tree, monkeypatch, lines: dict, found: tuple) -> None:
    """Linux before 3.14, and what is made to look like it."""
    pages = {"SC_PAGE_SIZE": GIB, "SC_PHYS_PAGES": 16, "SC_AVPHYS_PAGES": 2}
    monkeypatch.setattr(hardware.os, "sysconf", lambda name: pages[name])
    tree._write("meminfo", "".join(f"{name}: {size << 20} kB\n" for name, size in lines.items()))
    assert tree.memory()[:2] == tuple(size * GIB for size in found)


def test_a_system_that_says_nothing_of_its_memory_is_an_error_in_a_line(tree: Tree, monkeypatch) -> None:
    monkeypatch.setattr(hardware.os, "sysconf", lambda name: -1)
    (tree.root / "meminfo").unlink()
    with pytest.raises(HybridError, match="meminfo has no MemTotal or MemFree"):
        tree.memory()


def test_this_machine_has_no_more_than_it_says() -> None:
    total, available, _ = hardware.memory()
    machine = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available <= total <= machine


@pytest.fixture
def limited(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> hardware.HardwareSpec:
    """This machine as a process in a small group sees it."""
    tree.mount("sys").own(UNIFIED + "/box")
    tree.group("sys/box", memory_max=100 * MIB, memory_current=40 * MIB, cpu_max="50000 100000")
    here = hardware.probe()
    memory = hardware.memory(tree.proc, tree.root / "meminfo", tree.root / "nodes")
    quota = tree.groups().cpu_limit()
    spec = replace(
        here, memory_total=memory.total, memory_available=memory.available, memory_limit=memory.limit, cpu_limit=quota
    )
    monkeypatch.setattr("hybrid.plan.resolve.probe", lambda isa: spec)
    monkeypatch.setattr("hybrid.machine.hardware.probe", lambda isa=None: spec)
    return spec


def test_a_plan_says_the_limits_and_where_they_come_from(limited: hardware.HardwareSpec, tree: Tree) -> None:
    plan = plan_model(EngineConfig())
    text, box = plan_text(plan), tree.root / "sys/box"
    assert f"limit: memory of at most 0.10 GB, 62.91 MB of it free ({box}/memory.max)" in text
    assert f"limit: 0.5 of {len(limited.cpus)} cores ({box}/cpu.max)" in text
    assert plan.problem and f"62.91 MB are free within the limit that {box}/memory.max sets" in plan.problem
    assert plan.problem.endswith("or raise that limit")
    assert json.loads(json.dumps(plan.to_dict(), default=str))["limits"] == list(limited.limits)


def test_a_run_in_a_small_group_is_refused_before_it_loads(limited: hardware.HardwareSpec) -> None:
    result = CliRunner().invoke(app, ["--prompt", "x"])
    assert result.exit_code == 2 and "does not fit in memory" in result.stderr
    assert "limit: memory of at most" in CliRunner().invoke(app, ["--print-config"]).stdout
