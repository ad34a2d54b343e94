"""What bench/device.py times: the limits of a GPU, a layer of experts in its slots, and copies of experts into them.

Experts are valid, but all alike, and so are the blocks of their matrices: only where they lie matters. A sample is as
many calls of a layer, each on other slots, as read more memory than caches hold.
"""

from __future__ import annotations

import ctypes
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from kernel_cases import Shape, choose_experts, expert_weights
from triton.errors import TritonError

from gpu_cache.device import Bytes
from gpu_cache.devices.staging import BUFFER_BYTES, StagingRing
from gpu_cache.devices.streams import Memory, Streams
from gpu_cache.devices.torch_streams import HostWorker, TorchStreams
from gpu_cache.errors import DeviceFull, DeviceLost, PinningRefused, first_line
from gpu_cache.kernels.experts import FEW, FEW_ROWS, MANY, ExpertKernels, ExpertLayout, Tiling
from hybrid.errors import CapacityError, DeviceFailed
from hybrid.gpu.graphs import capture_on
from hybrid.machine.gpu import driver_version, free_bytes
from hybrid.machine.hardware import memory, probe
from hybrid.models.layers.base import Cost

TRIES = 10  # of a limit, the best of which counts
PRODUCTS = 4  # in a try of the matrix peak
MAX_CALLS = 64  # of a layer in a sample
ROOM = 0.8  # of the free memory is for slots
FEW_TILINGS = tuple(
    Tiling(blocks, FEW_ROWS, warps, stages) for blocks in (1, 2, 4) for warps in (1, 2, 4) for stages in (2, 3, 5, 8)
)
MANY_TILINGS = tuple(
    Tiling(blocks, rows, warps, stages)
    for rows, blocks in ((16, 4), (32, 4), (32, 8), (64, 4), (64, 8), (64, 16), (128, 4), (128, 8))
    for warps in (4, 8)
    for stages in (3, 4)
)


@dataclass(frozen=True)
class Sizes:
    """cold_bytes: what a sample of experts or copies reads at least. calls: of a layer in a sample, at least.

    read_bytes: of the tensor that bandwidth is measured on; matrices: widths of the squares that are multiplied.
    """

    cold_bytes: int
    calls: int
    read_bytes: int
    matrices: tuple[int, ...]


FULL = Sizes(512 << 20, 8, 2 << 30, (4096, 8192))
TRIAL = Sizes(1 << 15, 1, 1 << 20, (64,))


class Place:
    """A device, and clocks for what it is asked to do. notes: what could not be had."""

    def __init__(self, name: str) -> None:
        """name: "cuda", or "cpu" for a trial."""
        self.device, self.gpu = torch.device(name), name == "cuda"
        self.sizes = FULL if self.gpu else TRIAL
        self.streams = self.open_streams()
        self.notes: list[str] = []

    def open_streams(self) -> Streams:
        return TorchStreams() if self.gpu else HostStreams()

    def queue(self) -> AbstractContextManager[object]:
        """What is asked for inside goes to the stream that is timed."""
        return torch.cuda.stream(self.streams.compute) if self.gpu else nullcontext()

    def device_seconds(self, work: Callable[[], object]) -> float:
        """What the device takes for what `work` asks of it, by the device's clock."""
        streams = self.streams
        first = streams.record(streams.compute)
        self._launch(work)
        last = streams.record(streams.compute)
        streams.synchronise(last)
        return streams.seconds(first, last)

    def host_seconds(self, streams: Streams, work: Callable[[], object]) -> float:
        """Until the copies that `work` asks for have ended, by the host's clock."""
        start = perf_counter()
        work()
        streams.synchronise(streams.record(streams.copy))
        return perf_counter() - start

    def repeatable(self, work: Callable[[], object]) -> tuple[Callable[[], object], bool]:
        """`work` as a CUDA graph, and whether it is one: not where there are none, or it cannot be captured."""
        capture = capture_on(self.device)
        if capture is None:
            return work, False
        found: list[Callable[[], object]] = []
        try:
            self._launch(lambda: found.append(capture(work)[0]))
        except (RuntimeError, DeviceLost) as error:
            self.note(f"no CUDA graph ({first_line(error)}), so launches from Python count")
            return work, False
        return found[0], True

    def _launch(self, work: Callable[[], object]) -> None:
        def launched() -> None:
            work()

        self.streams.launch(self.streams.compute, launched)

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def free_bytes(self) -> int:
        if not self.gpu:
            return memory()[1]
        torch.cuda.empty_cache()
        return free_bytes()

    def describe(self) -> dict[str, Any]:
        common = {
            "device": "GPU" if self.gpu else "torch's CPU device and Triton's interpreter: figures mean nothing",
            "torch": torch.__version__, "triton": triton.__version__,
            "cpu": probe().cpu_model, "system": platform.platform(),
        }  # fmt: skip
        if not self.gpu:
            return common | {"gpu": None, "gpu_memory": None, "capability": None, "cuda": None, "driver_cuda": None}
        found = torch.cuda.get_device_properties(self.device)
        return common | {
            "gpu": found.name, "gpu_memory": found.total_memory, "capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda, "driver_cuda": ".".join(map(str, driver_version() or ())) or None,
        }  # fmt: skip


class HostStreams:
    """See `gpu_cache.devices.streams.Streams`, without a device: all happens at once, and an event is its time."""

    copy, compute = "copy", "compute"

    def allocate(self, shape: Sequence[int], dtype: npt.DTypeLike = np.uint8) -> Memory:
        return torch.from_numpy(np.zeros(tuple(shape), dtype))

    def staging(self, nbytes: int) -> Bytes:
        return np.zeros(nbytes, np.uint8)

    def pin(self, regions: Sequence[Bytes]) -> None: ...

    def fill(self, stream: str, target: Memory, value: int) -> None:
        target.fill_(value)

    def upload(self, stream: str, target: Memory, host: Bytes) -> None:
        target.copy_(torch.from_numpy(host))

    def launch(self, stream: str, work: Callable[[], None]) -> None:
        work()

    def record(self, stream: str) -> float:
        return perf_counter()

    def wait(self, stream: str, event: float) -> None: ...

    def done(self, event: float) -> bool:
        return True

    def synchronise(self, event: float) -> None: ...

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def worker(self) -> HostWorker:
        return HostWorker()

    def close(self) -> None: ...


@contextmanager
def device_errors() -> Iterator[None]:
    """What a device refuses, as errors of ours."""
    try:
        yield
    except (DeviceFull, PinningRefused, torch.OutOfMemoryError) as error:
        raise CapacityError(f"{first_line(error)}; free memory, or measure smaller --shapes") from None
    except DeviceLost as error:
        raise DeviceFailed(f"the GPU failed: {error}; see nvidia-smi") from None
    except TritonError as error:
        raise DeviceFailed(f"Triton cannot make a kernel for this GPU: {first_line(error)}") from None


# Limits


@dataclass(frozen=True)
class Limits:
    """read: bytes a second of the device's memory; flops: a second, of bf16 products; copy: bytes a second to it."""

    read: float
    flops: float
    copy: float


def measure_limits(place: Place) -> Limits:
    return Limits(
        _read_rate(place), max(_flops_rate(place, width) for width in place.sizes.matrices), _copy_rate(place)
    )


def _best(seconds: Callable[[Callable[[], object]], float], work: Callable[[], object]) -> float:
    """The least of some tries, after one that warms up."""
    return min([seconds(work) for _ in range(1 + TRIES)][1:])


def _read_rate(place: Place) -> float:
    """Of a sum, which reads alone, or of a copy within the device, which reads and writes: the faster."""
    size = place.sizes.read_bytes
    tensor = torch.ones(size // 4, dtype=torch.float32, device=place.device)
    other, total = torch.empty_like(tensor), torch.empty((), dtype=torch.float32, device=place.device)
    summed = _best(place.device_seconds, lambda: torch.sum(tensor, dim=0, out=total))
    copied = _best(place.device_seconds, lambda: other.copy_(tensor))
    return max(size / summed, 2 * size / copied)


def _flops_rate(place: Place, width: int) -> float:
    left, right = (_random((width, width), place.device) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=out)

    return 2.0 * PRODUCTS * width**3 / _best(place.device_seconds, multiply)


def _random(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _copy_rate(place: Place) -> float:
    streams, size = place.streams, place.sizes.cold_bytes
    host, there = streams.staging(size), streams.allocate((size,))
    host.fill(1)
    return size / _best(
        lambda work: place.host_seconds(streams, work), lambda: streams.upload(streams.copy, there, host)
    )


# Experts


class Layer:
    """The experts of a layer in slots, several times if caches could hold them: slots are layers times experts.

    expert: bytes of one, on the host. memory: uint8 [slots, bytes] on the device.
    """

    def __init__(self, place: Place, shape: Shape, format: str) -> None:
        """Raises CapacityError where one layer does not fit."""
        self.place, self.shape = place, shape
        self.layout = ExpertLayout(format, shape.hidden, shape.intermediate)
        size, free = shape.experts * self.layout.nbytes, place.free_bytes() * ROOM
        if size > free:
            raise CapacityError(
                f"a layer of {shape.experts} experts in {format} takes {size / 1e9:.1f} GB, the GPU has room for "
                f"{free / 1e9:.1f} GB; measure smaller --shapes or --formats"
            )
        self.layers = min(-(-place.sizes.cold_bytes // size), int(free // size))
        self.expert = _packed_expert(shape, format, self.layout.nbytes)
        self.memory = place.streams.allocate((self.layers * shape.experts, self.layout.nbytes))
        self.memory[:] = torch.from_numpy(self.expert).to(place.device)

    def slot_ids(self, calls: int, rows: int, routing: str) -> npt.NDArray[np.int32]:
        """[calls, rows, top_k]: every row hits, and a call goes to the next experts, in the next layer after the
        last.
        """
        experts = self.shape.experts
        layer = np.arange(calls) * min(rows * self.shape.top_k, experts) // experts % self.layers
        return (choose_experts(self.shape, routing, calls, rows) + experts * layer[:, None, None]).astype(np.int32)


def _packed_expert(shape: Shape, format: str, size: int) -> Bytes:
    weights = expert_weights(replace(shape, experts=1), format)
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(weights.address)).copy()


@dataclass(frozen=True)
class Sample:
    """seconds, cost: of a layer. captured: as a CUDA graph, so that launches from Python do not count."""

    seconds: float
    cost: Cost
    captured: bool


def time_experts(layer: Layer, rows: int, routing: str, tiling: Tiling, repetitions: int) -> Sample:
    """The median of some samples. Raises TritonError where the device cannot run the tiling."""
    place, shape, layout = layer.place, layer.shape, layer.layout
    active = min(rows * shape.top_k, shape.experts)
    calls = min(MAX_CALLS, max(place.sizes.calls, -(-place.sizes.cold_bytes // (active * layout.nbytes))))
    ids = layer.slot_ids(calls, rows, routing)
    slots = [torch.from_numpy(chosen).to(place.device) for chosen in ids]  # each aligned, as those of a step are
    x = torch.zeros((rows, layout.hidden_stride), dtype=torch.bfloat16, device=place.device)
    x[:, : layout.hidden] = _random((rows, layout.hidden), place.device) * layout.hidden**-0.5
    few, many = (tiling, MANY) if rows <= FEW_ROWS else (FEW, tiling)
    kernels = ExpertKernels(layout, [layer.memory], rows, shape.top_k, few, many)

    def run() -> None:
        for chosen in slots:
            kernels.run(x, chosen)

    place.device_seconds(run)  # compiles
    again, captured = place.repeatable(run)
    place.device_seconds(again)
    seconds = statistics.median(place.device_seconds(again) for _ in range(repetitions)) / calls
    read = statistics.mean(len(np.unique(chosen)) for chosen in ids) * layout.nbytes
    flops = 2.0 * 3 * rows * shape.top_k * shape.hidden * shape.intermediate
    return Sample(seconds, Cost(read, flops), captured)


def default_tiling(rows: int) -> Tiling:
    return FEW if rows <= FEW_ROWS else MANY


def tilings(rows: int) -> tuple[Tiling, ...]:
    """Candidates for steps of so many rows."""
    return FEW_TILINGS if rows <= FEW_ROWS else MANY_TILINGS


def label(tiling: Tiling) -> str:
    """Rows x blocks of columns, then warps and stages if they are not Triton's choice: "64x4 w8 s3"."""
    options = [f"w{tiling.warps}"] * bool(tiling.warps) + [f"s{tiling.stages}"] * bool(tiling.stages)
    return " ".join([f"{tiling.rows}x{tiling.blocks}", *options])


# Copies


def time_copies(layer: Layer, repetitions: int) -> dict[str, float]:
    """Seconds an expert: through staging buffers from ordinary memory, and from the same memory once it is pinned."""
    place, size = layer.place, layer.layout.nbytes
    count = min(len(layer.memory), max(2, -(-place.sizes.cold_bytes // size)))
    host = np.empty((count, size), np.uint8)
    host[:] = layer.expert
    streams = place.open_streams()
    ring = StagingRing(streams, [size], BUFFER_BYTES, place.note)

    def staged() -> None:
        for slot in range(count):
            for _, first, last in ring.chunks:
                ring.copy(layer.memory[slot, first:last], host[slot, first:last])

    def direct() -> None:
        for slot in range(count):
            streams.upload(streams.copy, layer.memory[slot], host[slot])

    def median(work: Callable[[], None]) -> float:
        seconds = [place.host_seconds(streams, work) for _ in range(1 + repetitions)]
        return statistics.median(seconds[1:]) / count

    try:
        found = {"staged copy": median(staged)}
        try:
            streams.pin([host])
        except PinningRefused as error:
            place.note(f"{error}; no copies from pinned memory")
        else:
            found["pinned copy"] = median(direct)
    finally:
        streams.close()  # before the memory that it pinned goes
    return found
