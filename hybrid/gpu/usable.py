"""Whether there is a GPU that `--device cuda` can use, and if not, what is missing."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

LEAST_CAPABILITY = (8, 0)  # the first with bf16 on its tensor cores
INSTALL = "pip install 'hybrid-moe[gpu]'"


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
    return _capability_problem(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def free_bytes() -> int:
    """Bytes that are free on the GPU. Only where `why_unusable` is None."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free)


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
    if capability >= LEAST_CAPABILITY:
        return None
    have, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
    return f"{name} has compute capability {have}, at least {least} is needed"
