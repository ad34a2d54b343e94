"""Opens the device's part of a step: its weights, its mirror, and the buffers that it shares with the threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from gpu_cache.errors import first_line
from hybrid.errors import CapacityError, DeviceFailed
from hybrid.gpu.attention_choice import choose_for_steps
from hybrid.gpu.graphs import capture_on
from hybrid.gpu.layers.base import kind_of
from hybrid.gpu.link import Link
from hybrid.gpu.mirror import KvMirror
from hybrid.gpu.step import DeviceStep
from hybrid.gpu.weights import load_weights
from hybrid.machine.memory import size_text, view
from hybrid.plan.plan import Plan
from hybrid.weights.store import Store


def open_step(
    plan: Plan,
    store: Store,
    weight: Callable[[str], int],
    buffer: Callable[[str], int],
    arena: tuple[int, int],
    states: int,
) -> DeviceStep:
    """weight, buffer: addresses of tensors of the store, and of buffers of the engine, which lie in `arena`, (address,
    bytes). states: address of those of all sequences. All of it must live as long as the step.

    Raises CapacityError when the device has less memory than was planned, DeviceFailed where it does not work.
    """
    assert plan.device is not None
    try:
        return _open(plan, store, weight, buffer, arena, states, torch.device(plan.device.torch_device))
    except torch.OutOfMemoryError:
        raise CapacityError(
            f"the device has no room for {size_text(plan.device.weights)} of weights and {size_text(plan.device.kv)} "
            "of keys and values any more: free its memory, lower --gpu-kv-tokens or use --device cpu"
        ) from None
    except RuntimeError as error:
        raise DeviceFailed(f"the device cannot be used ({first_line(error)}); use --device cpu") from error


def _open(
    plan: Plan,
    store: Store,
    weight: Callable[[str], int],
    buffer: Callable[[str], int],
    arena: tuple[int, int],
    states: int,
    device: torch.device,
) -> DeviceStep:
    assert plan.device is not None

    def read(name: str) -> npt.NDArray[np.generic]:
        tensor = store.tensors[name]
        return view(weight(name), tensor.shape, np.uint8 if tensor.dtype == "U8" else np.float32)

    spec, mix = store.spec.within(plan.max_seq_len), plan.formats
    weights = load_weights(spec, mix, store.tensors, read, device)
    mirror = KvMirror(plan.sequences, plan.device.kv_tokens)
    link = Link(device)
    problem = link.pin(*arena)
    wanted = plan.cuda_graphs and not problem  # a copy that waits cannot be captured
    capture = capture_on(device) if wanted else None
    if link.stream:
        torch.cuda.synchronize(device)  # weights came by another stream
    graphs = capture and capture_on(device)  # with memory that is given back
    shapes = (kind_of(half).whole_shape(half) for _, half in spec.halves(mix))
    with link.queue():
        heads = next((shape for shape in shapes if shape), None)
        attention = choose_for_steps(heads, plan.sequences, plan.max_rows, mirror.capacity, device, graphs)
        return DeviceStep(spec, plan, weights, mirror, attention, link, buffer, states, capture, problem)
