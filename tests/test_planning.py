"""`--device auto` is a GPU that can be used, else the CPU, and a line says why a GPU that is here is not used."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid import LLM
from hybrid.commands import run as main
from hybrid.config import CacheConfig, EngineConfig
from hybrid.engine.engine import Engine
from hybrid.errors import ConfigError, WeightsError
from hybrid.machine import gpu as usable
from hybrid.machine.hardware import MemoryNode, probe
from hybrid.plan.resolve import plan_model, resolve_device
from hybrid.plan.text import plan_text

ROOT = Path(__file__).parent.parent
SMALL = {"threads": 2, "max_batch": 2, "chunk_size": 64, "max_seq_len": 256}
GPU = {"vendor": "0x10de", "class": "0x030200"}


@pytest.fixture
def gpu(monkeypatch):
    """Puts a GPU in place, or none; it can be used unless there is a problem."""
    monkeypatch.delenv("HYBRID_DEVICE")

    def put(here: bool = True, problem: str | None = None, free: int = 10**9) -> None:
        monkeypatch.setattr(usable, "gpu_is_here", lambda: here)
        monkeypatch.setattr(usable, "why_unusable", lambda: problem)
        monkeypatch.setattr(usable, "free_bytes", lambda: free)

    return put


def device_of(**choices) -> tuple[str, list[str]]:
    """What auto is, and what is said about it."""
    notes: list[str] = []
    found = resolve_device(EngineConfig(**SMALL | choices), notes.append).device
    assert plan_model(EngineConfig(**SMALL | choices)).device_name == found
    return found, notes


def not_to_be_asked() -> None:
    raise AssertionError


def test_a_gpu_that_can_be_used_is(gpu) -> None:
    gpu()
    assert device_of() == ("cuda", [])
    plan = plan_model(EngineConfig(**SMALL))
    assert plan.cache.device == plan.device.torch_device == plan.device_name == plan.to_dict()["device_name"] == "cuda"
    assert "device cuda" in plan_text(plan).splitlines()[0]


def test_without_a_gpu_nothing_is_asked_or_said(gpu, monkeypatch) -> None:
    gpu(here=False)
    monkeypatch.setattr(usable, "why_unusable", not_to_be_asked)
    assert device_of() == ("cpu", [])


def test_without_a_gpu_a_run_imports_no_torch() -> None:
    code = (
        "import os, sys; del os.environ['HYBRID_DEVICE']; from pathlib import Path;"
        "from hybrid.machine import gpu as usable;"
        "usable.PCI_DEVICES = usable.WINDOWS_GPU = Path('/missing'); usable.DRIVER_MARKS = ();"
        "from hybrid import LLM; llm = LLM(); llm.generate('x');"
        "print(llm.engine.plan.device_name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "False"]


def test_a_gpu_that_cannot_be_used_is_said_in_a_line(gpu) -> None:
    gpu(problem="torch is not installed (pip install it)")
    line = "note: a GPU is here but torch is not installed (pip install it); going on with the CPU"
    assert device_of() == ("cpu", [line])
    notes: list[str] = []
    with Engine.open(EngineConfig(**SMALL), notice=notes.append) as engine:
        assert engine.plan.device_name == "cpu"
    with LLM(**SMALL, notice=notes.append) as llm:
        assert llm.engine.experts is None and llm.engine.device_step is None
    assert [note for note in notes if "GPU" in note] == [line, line]
    with pytest.raises(ConfigError, match="--device cuda cannot be had: torch is not installed"):
        plan_model(EngineConfig(**SMALL, device="cuda"))


def test_a_gpu_that_is_too_small_is_not_used_unless_it_is_asked_for(gpu) -> None:
    gpu(free=10**6)
    device, (note,) = device_of()
    assert device == "cpu"
    assert note.startswith("note: a GPU is here but the device has 1.00 MB free; weights take ")
    assert note.endswith("going on with the CPU") and "\n" not in note
    with pytest.raises(ConfigError, match="the device has .* free"):
        plan_model(EngineConfig(**SMALL, device="cuda"))
    device, (note,) = device_of(step_on="threads", cache=CacheConfig(16, 16))
    assert device == "cpu" and "256 slots" in note


def test_several_memory_nodes_keep_the_gpu_out_with_a_line(gpu, monkeypatch) -> None:
    gpu()
    nodes = (MemoryNode(0, (0,)), MemoryNode(1, (1,)))
    machine = replace(probe(), cpus=(0, 1), default_threads=2, nodes=nodes)
    monkeypatch.setattr("hybrid.plan.resolve.probe", lambda isa: machine)
    device, (note,) = device_of()
    assert device == "cpu" and "2 memory nodes; use --numa off" in note
    assert device_of(numa="off") == ("cuda", [])


@pytest.mark.parametrize(
    "choices",
    [{"numa": "2"}, {"step_on": "torch-cpu"}, {"step_on": "threads", "cache": CacheConfig(mode="off")}],
    ids=str,
)
def test_flags_that_exclude_a_gpu_mean_the_cpu(gpu, monkeypatch, choices) -> None:
    gpu()
    monkeypatch.setattr(usable, "gpu_is_here", not_to_be_asked)
    assert device_of(**choices) == ("cpu", [])


def test_what_forbids_the_cpu_too_is_raised(gpu) -> None:
    gpu()
    with pytest.raises(WeightsError, match="/missing"):
        resolve_device(EngineConfig(model_path=Path("/missing")))
    with pytest.raises(ConfigError, match="--max-seq-len 1000000 is above"):
        resolve_device(EngineConfig(max_seq_len=1_000_000))


def test_a_variable_names_the_device_of_auto(gpu, monkeypatch) -> None:
    gpu()
    monkeypatch.setenv("HYBRID_DEVICE", "simulated")
    assert device_of() == ("simulated", [])
    assert resolve_device(EngineConfig(device="cuda")).device == "cuda"
    monkeypatch.setenv("HYBRID_DEVICE", "auto")
    assert device_of() == ("cuda", [])
    monkeypatch.setenv("HYBRID_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="HYBRID_DEVICE is 'gpu'; allowed: auto, cpu, simulated, cuda, or unset it"):
        device_of()


def test_the_command_plans_for_what_it_found(gpu, tmp_path) -> None:
    wanted = ["--dry-run", "--json", "--cache-nblocks", "14", "--cache-nways", "4"]
    saved = ["--cache-save", str(tmp_path / "warm.json")]
    gpu()
    found = CliRunner().invoke(main.app, wanted + saved)
    assert json.loads(found.stdout)["device_name"] == "cuda" and found.stderr == ""
    gpu(problem="no NVIDIA driver is installed")
    found = CliRunner().invoke(main.app, wanted)
    assert json.loads(found.stdout)["device_name"] == "cpu"
    lines = found.stderr.splitlines()
    assert len(lines) == 2 and "no effect on this machine" in lines[0] and "no NVIDIA driver" in lines[1]
    assert CliRunner().invoke(main.app, wanted + saved).exit_code == 2


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Nothing of NVIDIA; returns a way to put a PCI device there."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(usable, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setattr(usable, "DRIVER_MARKS", (tmp_path / "nvidia0", tmp_path / "version"))
    monkeypatch.setattr(usable, "WINDOWS_GPU", tmp_path / "dxg")
    monkeypatch.setattr(usable, "driver_version", lambda: None)

    def put(name: str, **files: str) -> None:
        (tmp_path / "pci" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "pci" / name / file).write_text(text + "\n")

    return put


@pytest.mark.parametrize(
    ("device", "here"),
    [
        (GPU, True),
        (GPU | {"class": "0x030000"}, True),
        (GPU | {"class": "0x040300"}, False),
        (GPU | {"vendor": "0x1002"}, False),
        ({"vendor": "0x10de"}, False),
    ],
    ids=str,
)
def test_hardware_is_found_among_pci_devices(machine, device, here) -> None:
    machine("0000:00:00.0", vendor="0x8086", **{"class": "0x060000"})
    assert not usable.gpu_is_here()
    machine("0000:01:00.0", **device)
    assert usable.gpu_is_here() == here


@pytest.mark.parametrize("name", ["nvidia0", "version"])
def test_hardware_is_found_by_its_driver(machine, tmp_path, name) -> None:
    (tmp_path / name).touch()
    assert usable.gpu_is_here()


def test_in_windows_a_gpu_is_one_of_nvidia_if_its_driver_is_there(machine, monkeypatch, tmp_path) -> None:
    (tmp_path / "dxg").touch()
    assert not usable.gpu_is_here()
    monkeypatch.setattr(usable, "driver_version", lambda: (12, 8))
    assert usable.gpu_is_here()


@pytest.mark.parametrize(("visible", "here"), [("", False), ("-1", False), ("0", True)])
def test_a_gpu_that_is_hidden_is_not_here(machine, monkeypatch, visible, here) -> None:
    machine("0000:01:00.0", **GPU)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable.gpu_is_here() == here
