"""What passes between the memory of the host and the device: copies that nobody waits for until they are needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrid.machine.memory import view


class Link:
    """Copies between buffers of the engine and tensors of a device, in the order in which they are asked for.

    On the CPU device a copy has happened when the call returns, and there is nothing to wait for. stream: of all that
    a step asks of a GPU, None on the CPU device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._pinned = device, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def queue(self) -> AbstractContextManager[object]:
        """What is asked for inside goes to the stream."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def to_host(self, buffer: Tensor, tensor: Tensor) -> None:
        """What is in the buffer means nothing before `wait`."""
        buffer.copy_(tensor, non_blocking=True)

    def to_device(self, buffer: Tensor) -> Tensor:
        """A copy; the buffer must not change before `wait`."""
        return buffer.to(self.device, non_blocking=True, copy=True)

    def mark(self) -> Any:
        """A point in what the device was asked to do, for `wait`."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, mark: Any) -> None:
        """Until the device has done all that it was asked for before the mark."""
        if mark is not None:
            mark.synchronize()

    def time(self) -> Any:
        """The time at which the device has done all that it was asked for, for `Clock`."""
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def pin(self, address: int, size: int) -> str | None:
        """Let the device read and write this memory by itself, until `unpin`. Returns why it may not: then every copy
        waits for those before it.
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
    """Turns times of a link into seconds of time.perf_counter, once the device has done what they belong to."""

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
