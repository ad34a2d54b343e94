"""Whether there is a GPU, whether `--device cuda` can use it, and if not, what is missing."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

MIN_CAPABILITY = (8, 0)  # the first with bf16 on its tensor cores
INSTALL = "pip install 'hybrid-moe[gpu]'"
PCI_DEVICES = Path("/sys/bus/pci/devices")
DRIVER_MARKS = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia/version"))
WINDOWS_GPU = Path("/dev/dxg")  # where Linux runs in Windows: a GPU of any maker
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # a vendor; what the classes of its GPUs begin with


def gpu_is_here() -> bool:
    """Whether there is hardware of NVIDIA that is not hidden. It takes no torch, and no time."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if any(mark.exists() for mark in DRIVER_MARKS) or any(map(_is_nvidia_gpu, PCI_DEVICES.glob("*"))):
        return True
    return WINDOWS_GPU.exists() and driver_version() is not None


def _is_nvidia_gpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == _NVIDIA and kind.startswith(_DISPLAY)


def why_unusable() -> str | None:
    """What stands in the way, in half a sentence with what to do about it; None if nothing does."""
    for package in ("torch", "triton"):
        if find_spec(package) is None:
            return f"{package} is not installed ({INSTALL})"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA (uninstall it, then {INSTALL})"
    if problem := _driver_problem(torch.version.cuda):
        return problem
    if not torch.cuda.is_available():
        return "the NVIDIA driver is there but finds no GPU (see nvidia-smi, and CUDA_VISIBLE_DEVICES)"
    try:
        free_bytes()  # the first that needs the GPU itself
        return _capability_problem(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    except RuntimeError as error:
        return f"the GPU cannot be opened ({str(error).partition(chr(10))[0]}; see nvidia-smi)"


def free_bytes() -> int:
    """Bytes that are free on the GPU. Only where `why_unusable` is None."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free)


def device_mark(place: str) -> str:
    """What tells one of torch's devices from another: its name and memory, and the CUDA version."""
    if place != "cuda":
        return place
    import torch

    found = torch.cuda.get_device_properties(place)
    return f"{found.name} {found.total_memory} {torch.version.cuda}"


def _driver_problem(wanted: str) -> str | None:
    """wanted: the CUDA version that torch was built for, '12.8'. Within a major version every driver will do."""
    version = driver_version()
    if version is None:
        return "no NVIDIA driver is installed (libcuda.so.1 is missing)"
    if version[0] < int(wanted.split(".")[0]):
        return f"the NVIDIA driver is too old: it knows CUDA {version[0]}.{version[1]}, torch needs {wanted}"
    return None


def driver_version() -> tuple[int, int] | None:
    """The CUDA version that the driver knows; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _capability_problem(name: str, capability: tuple[int, int]) -> str | None:
    if capability >= MIN_CAPABILITY:
        return None
    have, needed = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
    return f"{name} has compute capability {have}, at least {needed} is needed"
