"""The parts of the real streams that need no GPU: the staging thread, what errors become, and read-only weights."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from stream_standin import Event, StandIn

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[live]'")

from gpu_cache.devices.cuda import CudaDevice  # noqa: E402
from gpu_cache.devices.torch_streams import (  # noqa: E402
    PAGE,
    HostWorker,
    _as_tensor,
    _device_errors,
    _torch_dtype,
    page_ranges,
)
from gpu_cache.errors import DeviceFull, DeviceLost  # noqa: E402

PATIENCE = 600  # seconds until a test that hangs fails
SIZES = (4096, 64)


def test_tasks_run_in_order_and_can_be_waited_for() -> None:
    worker, seen = HostWorker(), []
    for i in range(100):
        worker.submit(lambda i=i: (time.sleep(1e-4), seen.append(i)))
    worker.drain()
    assert seen == list(range(100))
    worker.close()


def test_closing_waits_for_the_task_at_hand_and_drops_the_others() -> None:
    worker, started, seen = HostWorker(), threading.Event(), []

    def at_hand() -> None:
        started.set()
        until = time.monotonic() + PATIENCE
        while not worker._closing and time.monotonic() < until:
            time.sleep(1e-3)
        time.sleep(0.05)  # who does not wait has looked before
        seen.append(0)

    worker.submit(at_hand)
    worker.submit(lambda: seen.append(1))
    assert started.wait(PATIENCE)
    worker.close()
    assert seen == [0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore"), DeviceFull),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), DeviceLost),
        (RuntimeError("the size of tensor a must match"), RuntimeError),  # a mistake of ours stays what it is
        (KeyError("x"), KeyError),
    ],
)
def test_what_torch_raises_becomes_one_line_of_ours(error, kind) -> None:
    with pytest.raises(kind) as found, _device_errors():
        raise error
    assert type(found.value) is kind and "\n" not in str(found.value)


def test_weights_that_may_not_be_written_can_be_copied_from() -> None:
    weights = np.arange(100, dtype=np.uint8)
    weights.flags.writeable = False
    assert np.array_equal(_as_tensor(weights).numpy(), weights)
    assert _torch_dtype(np.int32) is torch.int32


def test_pages_are_pinned_once() -> None:
    memory = np.zeros(10 * PAGE, np.uint8)
    base = -memory.ctypes.data % PAGE
    start = memory.ctypes.data + base
    parts = [memory[base + first : base + last] for first, last in ((6 * PAGE, 7 * PAGE), (100, 200), (300, PAGE + 1))]
    assert page_ranges(parts) == [(start, start + 2 * PAGE), (start + 6 * PAGE, start + 7 * PAGE)]
    touching = [memory[base : base + PAGE], memory[base + PAGE : base + 2 * PAGE]]
    assert page_ranges(touching) == [(start, start + PAGE), (start + PAGE, start + 2 * PAGE)]
    assert page_ranges([]) == []


class WithThread(StandIn):
    """Everything happens at once, but for the staging, which has a thread as on a GPU."""

    def worker(self) -> HostWorker:
        return HostWorker()

    def _queue(self, stream, what) -> None:
        if not isinstance(what, Event):
            what()


def test_copies_of_a_real_thread_hold_their_experts() -> None:
    def source(key: int) -> list[np.ndarray]:
        time.sleep(1e-4)
        return [np.full(size, key, np.uint8) for size in SIZES]

    class Nothing:
        def begin(self, slot_ids) -> None: ...
        def experts(self, ids, slot) -> None: ...
        def end(self) -> None: ...
        def collect(self) -> None: ...

    device = CudaDevice(WithThread(), 8, SIZES, source, lambda memory: Nothing(), keys=256, staging_bytes=1000)
    random, holds = np.random.default_rng(0), {}
    until = time.monotonic() + PATIENCE
    for key in range(200):
        slot = int(random.integers(8))
        while any(copy.slot == slot for copy in device._pending):
            assert time.monotonic() < until
            for ended, whole in device.poll():
                assert whole and all((memory[ended] == holds[ended]).all() for memory in device.memory)
        device.copy_in(slot, key)
        holds[slot] = key
    while device.pending:
        assert all(whole for _, whole in device.poll()) and time.monotonic() < until
    assert all((memory[slot] == key).all() for slot, key in holds.items() for memory in device.memory)
    table = device.slot_of.tolist()
    device.close()
    assert table == [next((s for s, k in holds.items() if k == key), -1) for key in range(256)]
