"""What is missing for `--device cuda` is said in one line each."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.machine import gpu as usable
from hybrid.plan.resolve import plan_model


class Driver:
    """libcuda."""

    def __init__(self, version: int, code: int = 0) -> None:
        self.version, self.code = version, code

    def cuDriverGetVersion(self, number) -> int:  # noqa: N802
        number._obj.value = self.version
        return self.code


def refuse():
    raise RuntimeError("CUDA error: all devices are busy\nSee the manual.")


def fake_torch(
    cuda: str | None = "12.8",
    available: bool = True,
    capability: tuple[int, int] = (8, 9),
    memory=lambda: (3 * 10**9, 24 * 10**9),
):
    gpu = SimpleNamespace(
        is_available=lambda: available,
        get_device_name=lambda: "GPU X",
        get_device_capability=lambda: capability,
        mem_get_info=memory,
    )
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=gpu, __version__="2.9.0")


@pytest.fixture
def machine(monkeypatch):
    """Puts packages and a driver in place: packages as names, None for a driver that is not there."""

    def put(torch=None, driver: Driver | None = None, packages=("torch", "triton")) -> None:
        monkeypatch.setattr(usable, "find_spec", lambda name: name if name in packages else None)
        monkeypatch.setitem(sys.modules, "torch", torch or fake_torch())

        def load(name: str):
            assert name == "libcuda.so.1"
            if driver is None:
                raise OSError
            return driver

        monkeypatch.setattr(ctypes, "CDLL", load)

    return put


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"packages": ()}, r"torch is not installed \(pip install 'hybrid-moe\[gpu\]'\)"),
        ({"packages": ("torch",)}, "triton is not installed"),
        ({"torch": fake_torch(cuda=None)}, "torch 2.9.0 is built without CUDA"),
        ({}, "no NVIDIA driver is installed"),
        ({"driver": Driver(0, 3)}, "no NVIDIA driver is installed"),
        ({"driver": Driver(11040)}, "driver is too old: it knows CUDA 11.4, torch needs 12.8"),
        ({"driver": Driver(12000), "torch": fake_torch(available=False)}, "finds no GPU"),
        (
            {"driver": Driver(13010), "torch": fake_torch(capability=(7, 5))},
            "GPU X has compute capability 7.5, at least 8",
        ),
        (
            {"driver": Driver(13010), "torch": fake_torch(memory=refuse)},
            r"the GPU cannot be opened \(CUDA error: all devices are busy; see nvidia-smi\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_is_named(machine, choices, words) -> None:
    machine(**choices)
    with pytest.raises(ConfigError, match=rf"--device cuda cannot be had: .*{words}.*; use auto, cpu or simulated$"):
        plan_model(EngineConfig(device="cuda"))


def test_a_gpu_that_can_be_used_is(machine) -> None:
    machine(driver=Driver(12090))
    assert usable.why_unusable() is None
    assert usable.free_bytes() == 3 * 10**9
    plan = plan_model(EngineConfig(device="cuda"))
    assert plan.cache.device == "cuda" and plan.cache.geometry.slots == 256  # all experts of the embedded model


def test_the_command_ends_with_one_line_and_code_2(machine) -> None:
    from hybrid.commands.run import app

    machine(packages=())
    result = CliRunner().invoke(app, ["--device", "cuda", "--prompt", "x"])
    assert result.exit_code == 2
    assert "torch is not installed" in result.output and result.output.count("\n") == 1


def test_auto_goes_on_with_the_cpu(machine, monkeypatch) -> None:
    monkeypatch.delenv("HYBRID_DEVICE")
    monkeypatch.setattr(usable, "gpu_is_here", lambda: True)
    machine(packages=())
    assert plan_model(EngineConfig()).cache is None
    machine(driver=Driver(12090))
    assert plan_model(EngineConfig()).cache.device == "cuda"
