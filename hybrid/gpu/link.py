"""Copies between host and device memory that are only waited for when their data is needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.machine.memory import view


class Link:
    """Copies between buffers of the engine and tensors of a device, in the order of the calls.

    On torch's CPU device a copy is complete when the call returns. stream: the stream of all work of a step on a GPU,
    None on the CPU device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._pinned = device, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def queue(self) -> AbstractContextManager[object]:
        """Context in which work is queued on the stream."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def to_host(self, buffer: Tensor, tensor: Tensor) -> None:
        """Queue a copy into a buffer, whose content is undefined before `wait`."""
        buffer.copy_(tensor, non_blocking=True)

    def to_device(self, buffer: Tensor) -> Tensor:
        """Queue a copy from a buffer, which must not change before `wait`."""
        return buffer.to(self.device, non_blocking=True, copy=True)

    def mark(self) -> Any:
        """An event after all work queued so far, for `wait`."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """Block until the device has done all work before the mark."""
        if mark is not None:
            mark.synchronize()

    def time(self) -> Any:
        """A time stamp after all work queued so far, for `Clock`."""
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def pin(self, address: int, size: int) -> str | None:
        """Pin this memory, so that copies are asynchronous, until `unpin`. Returns why it was refused, or None; without
        it every copy waits for the earlier ones.
        """
        if self.device.type != "cuda":
            return None
        status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if status:
            return f"{size} bytes of buffers cannot be pinned (CUDA error {status}), so copies do not overlap"
        self._pinned = address
        return None

    def unpin(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned)
            self._pinned = 0


class Clock:
    """Turns time stamps of a link into seconds of time.perf_counter, after the device has reached them."""

    def __init__(self, link: Link) -> None:
        """Waits for the device."""
        self._zero = link.time()
        if link.device.type == "cuda":
            self._zero.synchronize()
        self._seconds = perf_counter()

    def seconds(self, time: Any) -> float:
        return time if isinstance(time, float) else self._seconds + self._zero.elapsed_time(time) / 1e3


def host_tensor(address: int, size: int, dtype: torch.dtype) -> Tensor:
    """`size` bytes of a buffer of the engine, which must outlive the tensor: [elements]."""
    return torch.from_numpy(view(address, (size,), np.uint8)).view(dtype)
