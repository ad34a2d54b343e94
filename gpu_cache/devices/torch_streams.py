"""Streams, events and memory of a GPU through torch. Imported only where a GPU is asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Event as Flag
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gpu_cache.device import Bytes
from gpu_cache.devices.streams import Memory
from gpu_cache.errors import DeviceFull, DeviceLost, PinningRefused, first_line

PAGE = 4096
_READ_ONLY = 8  # cudaHostRegisterReadOnly: what a mapped file of a store is


class TorchStreams:
    """See `gpu_cache.devices.streams.Streams`. device: torch's number of the GPU. compute: the stream of a step whose
    rows are on the device; None: a new stream.
    """

    def __init__(self, device: int = 0, compute: torch.cuda.Stream | None = None) -> None:
        self._device = torch.device("cuda", device)
        self._pinned: list[int] = []
        with _device_errors():
            self.copy = torch.cuda.Stream(self._device)
            self.compute = compute or torch.cuda.Stream(self._device)

    def allocate(self, shape: Sequence[int], dtype: npt.DTypeLike = np.uint8) -> Memory:
        with _device_errors():
            return torch.empty(tuple(shape), dtype=_torch_dtype(dtype), device=self._device)

    def staging(self, nbytes: int) -> Bytes:
        try:
            memory: Bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            raise _refused(nbytes, error) from None
        return memory

    def pin(self, regions: Sequence[Bytes]) -> None:
        for first, last in page_ranges(regions):
            self._register(first, last - first)

    def _register(self, address: int, size: int) -> None:
        """Try read-only first, because a mapped store is read-only. Copies only read."""
        code = 0
        for flags in (_READ_ONLY, 0):
            code = int(torch.cuda.cudart().cudaHostRegister(address, size, flags))
            if code == 0:
                return self._pinned.append(address)
            self._clear_error()
        raise _refused(size, f"cudaHostRegister returned {code}")

    def _clear_error(self) -> None:
        """CUDA keeps the error until the next check, and torch checks after every kernel: run a dummy kernel to consume
        it.
        """
        with suppress(RuntimeError):
            torch.zeros(1, device=self._device)

    def fill(self, stream: torch.cuda.Stream, target: Memory, value: int) -> None:
        with _device_errors(), torch.cuda.stream(stream):
            target.fill_(value)

    def upload(self, stream: torch.cuda.Stream, target: Memory, host: Bytes) -> None:
        with _device_errors(), torch.cuda.stream(stream):
            target.copy_(_as_tensor(host), non_blocking=True)

    def launch(self, stream: torch.cuda.Stream, work: Callable[[], None]) -> None:
        with _device_errors(), torch.cuda.stream(stream):
            work()

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        with _device_errors():
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        with _device_errors():
            stream.wait_event(event)

    def done(self, event: torch.cuda.Event) -> bool:
        with _device_errors():
            return bool(event.query())

    def synchronise(self, event: torch.cuda.Event) -> None:
        with _device_errors():
            event.synchronize()

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        with _device_errors():
            return float(first.elapsed_time(last)) * 1e-3

    def worker(self) -> HostWorker:
        return HostWorker()

    def close(self) -> None:
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:  # a lost device has nothing to wait for
            return
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._pinned.clear()


class HostWorker:
    """See `gpu_cache.devices.streams.Worker`."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closing = False
        self._thread = Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)

    def drain(self) -> None:
        done = Flag()
        self._tasks.put(done.set)
        done.wait()

    def close(self) -> None:
        self._closing = True
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None and not self._closing:
            task()


def page_ranges(regions: Sequence[Bytes]) -> list[tuple[int, int]]:
    """Address ranges [first, last) of whole pages that cover the regions, ascending. Regions that share a page become
    one range, because a page can be pinned only once.
    """
    ranges: list[tuple[int, int]] = []
    for start, end in sorted((region.ctypes.data, region.ctypes.data + region.nbytes) for region in regions):
        first, last = start // PAGE * PAGE, -(-end // PAGE) * PAGE
        if ranges and first < ranges[-1][1]:
            first, last = ranges[-1][0], max(last, ranges[-1][1])
            ranges.pop()
        ranges.append((first, last))
    return ranges


@contextmanager
def _device_errors() -> Iterator[None]:
    """Turn torch's exceptions into ours, with one-line messages."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceFull(first_line(error)) from None
    except RuntimeError as error:
        if "CUDA" not in str(error):
            raise
        raise DeviceLost(first_line(error)) from None


def _refused(nbytes: int, why: object) -> PinningRefused:
    return PinningRefused(f"pinned memory of {nbytes} bytes is refused ({first_line(why)})")


def _torch_dtype(dtype: npt.DTypeLike) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _as_tensor(host: Bytes) -> Any:
    """Avoids torch's warning about read-only arrays, such as a mapped store; a copy only reads."""
    if host.flags.writeable:
        return torch.from_numpy(host)
    memory: Any = (ctypes.c_uint8 * host.nbytes).from_address(host.ctypes.data)
    return torch.frombuffer(memory, dtype=torch.uint8)
