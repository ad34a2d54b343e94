"""Times one MoE layer of ours beside kt-kernel's, in turn in one process; compare.py reads its line of JSON.

Both get the same weights in bf16, which each quantises as it does where the format is int8 or int4, the same rows, and
the same experts and weights for every row: norm, router and the choice of experts are left out, what remains is the
sorting by expert, gate, up, activation, down and the weighted sum. The first call of each is compared with the other's
before anything is timed.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from kt_kernel import kt_kernel_ext

from hybrid.commands import bench
from hybrid.commands.measure import probe_of
from hybrid.config import EngineConfig
from hybrid.core import Batch
from hybrid.engine.engine import Engine
from hybrid.errors import KernelError
from hybrid.formats.block import round_up
from hybrid.machine.rates import MachineProbe
from hybrid.models.layers.base import Cost
from hybrid.models.layers.products import NORMED, expert_cost, quantise
from hybrid.plan.resolve import plan_model
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import cached_store

MOE_OPS = ("group", "gate_up", "quantise", "down")
M_STEP = 32  # kt-kernel has room for whole tiles of rows alone
REST_SECONDS = 0.1  # until kt-kernel's threads have stopped spinning
KINDS = {"bf16": "AMXBF16_MOE", "int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE"}  # with AVX-512 where tiles are missing
# Of the norm: both round activations and sums to bf16 or 8 bits. int4 has a scale for a whole row there.
TOLERANCES = {"bf16": 0.02, "int8": 0.04, "int4": 0.4}


class Layer:
    """Sizes of the layer, and what `calls` calls of `rows` rows are given: other experts each time, as in a model."""

    def __init__(self, spec: Any, rows: int) -> None:
        ffn, random = spec.layers[0].feed_forward, np.random.default_rng(rows)
        self.rows, self.calls, self.top_k = rows, max(2, 16 // rows), ffn.router.top_k
        self.hidden, self.intermediate, self.experts = spec.hidden, ffn.intermediate, ffn.experts
        self.input = random.standard_normal((rows, spec.hidden)).astype(ml_dtypes.bfloat16)
        shuffled = random.random((self.calls, rows, ffn.experts)).argsort(-1)
        self.ids = np.ascontiguousarray(shuffled[..., : self.top_k])
        weights = random.random(self.ids.shape, np.float32)
        self.weights = weights / weights.sum(-1, keepdims=True)

    def cost(self, format: str) -> Cost:
        """Of all calls, packed as ours: the experts that are touched, each once a call, and every product."""
        active = sum(len(np.unique(ids)) for ids in self.ids)
        return expert_cost(format, self.hidden, self.intermediate, active, self.ids.size)


class OurLayer:
    """An engine whose step is nothing but the MoE ops of layer 0."""

    def __init__(self, path: Path, threads: int | None, cache_dir: Path, rows: int, format: str) -> None:
        config = EngineConfig(
            model_path=path, device="cpu", weight_format=format, threads=threads, cache_dir=cache_dir,
            max_seq_len=rows, max_batch=1, chunk_size=rows,
        )  # fmt: skip
        plan = plan_model(config)
        ops = [op for op in plan.ops if op.layer == 0]
        spare = next(op.arguments["output"] for op in ops if op.kind == "attention")
        moe = [op for op in ops if op.kind in MOE_OPS and op.part != "attention"]
        self._ops = {op.kind: op for op in moe}
        first = self._ops["gate_up"].arguments
        made = [  # of the rows in bf16, as the norm would
            replace(op, layer=0, arguments=op.arguments | {"input": spare})
            for op in quantise("moe", NORMED, first["inputs"], format)
        ]
        self._input = spare if made else first["input"]
        store = cached_store(path, cache_dir, format)
        self.engine = Engine(store, replace(plan, ops=(*made, *moe)))

    def load(self, layer: Layer) -> None:
        ctypes.memmove(self.engine.addresses.buffer(self._input.name), layer.input.ctypes.data, layer.input.nbytes)
        self._zero_output(layer)

    def run(self, layer: Layer, call: int) -> None:
        self._write("group", "ids", layer.ids[call].astype(np.int32))
        self._write("group", "weights", layer.weights[call])
        nothing = np.zeros(layer.rows, np.int32)
        rows = np.arange(layer.rows, dtype=np.int32)
        self.engine.forward(Batch(nothing, nothing, rows, nothing[:0]))

    def output(self, layer: Layer) -> npt.NDArray[np.float32]:
        """The sums since `load`, float32 [rows, hidden]."""
        data = np.empty((layer.rows, layer.hidden), np.float32)
        ctypes.memmove(data.ctypes.data, self._address("down", "output"), data.nbytes)
        return data

    def _zero_output(self, layer: Layer) -> None:
        ctypes.memset(self._address("down", "output"), 0, layer.rows * layer.hidden * 4)

    def _write(self, op: str, argument: str, values: npt.NDArray[Any]) -> None:
        ctypes.memmove(self._address(op, argument), values.ctypes.data, values.nbytes)

    def _address(self, op: str, argument: str) -> int:
        return self.engine.addresses.buffer(self._ops[op].arguments[argument].name)


class TheirLayer:
    """kt-kernel's layer, over its lowest interface, as its own wrappers call it."""

    def __init__(self, checkpoint: Checkpoint, threads: int, rows: int, format: str) -> None:
        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self._cpu = kt_kernel_ext.CPUInfer(pool)
        ffn, hidden = checkpoint.spec.layers[0].feed_forward, checkpoint.spec.hidden
        assert ffn.router is not None
        self._on_gpu = torch.zeros(ffn.experts, dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(
            ffn.experts, ffn.router.top_k, hidden, ffn.intermediate, self._on_gpu.data_ptr()
        )
        config.layer_idx, config.pool, config.max_len = 0, self._cpu.backend_, round_up(rows, M_STEP)
        origin = ffn.origin(checkpoint.spec.place(0, checkpoint.native))
        experts = [[m.floats(0, m.count) for m in checkpoint.gated(origin, e)] for e in range(ffn.experts)]
        matrices = [np.stack(one) for one in zip(*experts, strict=True)]
        for name, matrix in zip(("gate", "up", "down"), matrices, strict=True):
            if format == "bf16":
                setattr(config, f"{name}_projs", [[expert.ctypes.data for expert in matrix]])
                setattr(config, f"{name}_scales", [[0] * ffn.experts])
            else:
                setattr(config, f"{name}_proj", matrix.ctypes.data)
        self._moe = kind_of(format)(config)
        order = torch.arange(ffn.experts)
        self._finish(self._moe.load_weights_task(order.data_ptr()))

    def load(self, layer: Layer) -> None:
        self._rows = torch.tensor([layer.rows], dtype=torch.int32)
        self._output = torch.zeros((layer.rows, layer.hidden), dtype=torch.bfloat16)

    def run(self, layer: Layer, call: int) -> None:
        self._finish(
            self._moe.forward_task(
                self._rows.data_ptr(), layer.top_k, layer.ids[call].ctypes.data, layer.weights[call].ctypes.data,
                layer.input.ctypes.data, self._output.data_ptr(), False,
            )
        )  # fmt: skip

    def output(self) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = self._output.float().numpy()
        return values

    def _finish(self, task: Any) -> None:
        self._cpu.submit(task)
        self._cpu.sync()


def kind_of(format: str) -> Any:
    """Its class for a format. Raises KernelError where the build for this processor has none."""
    kind = getattr(kt_kernel_ext.moe, KINDS[format], None)
    if kind is None and format == "bf16":
        kind = kt_kernel_ext.moe.AVX2BF16_MOE
    if kind is None:
        raise KernelError(f"kt-kernel has no {format} for this processor; take --formats bf16")
    return kind


def main(arguments: list[str]) -> None:
    """Arguments: checkpoint, threads (0: the cores), repetitions, folder of stores, format, and row counts."""
    path, threads, repetitions, work_dir, format, *counts = arguments
    rows = [int(count) for count in counts]
    ours = OurLayer(Path(path), int(threads) or None, Path(work_dir), max(rows), format)
    theirs = TheirLayer(Checkpoint.open(Path(path)), ours.engine.plan.threads, max(rows), format)
    probe = probe_of(ours.engine)
    said: dict[str, Any] = {"rows": [compare(ours, theirs, probe, count, int(repetitions), format) for count in rows]}
    said |= {"version": f"kt-kernel {version('kt-kernel')}", "machine": bench.describe_machine(ours.engine, probe)}
    print(json.dumps(said))


def compare(
    ours: OurLayer, theirs: TheirLayer, probe: MachineProbe, rows: int, repetitions: int, format: str
) -> dict[str, Any]:
    """Rows a second of both, medians, and our share of the machine's limit."""
    layer = Layer(ours.engine.spec, rows)
    ours.load(layer)
    theirs.load(layer)
    _check_equal(ours, theirs, layer, TOLERANCES[format])
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "shares": []}
    for _ in range(repetitions):
        ours.run(layer, 0)
        probe.measure()
        seconds["ours"].append(_timed(ours, layer))
        probe.measure()
        seconds["shares"].append(probe.seconds(layer.cost(format)) / seconds["ours"][-1])
        theirs.run(layer, 0)
        seconds["theirs"].append(_timed(theirs, layer))
        time.sleep(REST_SECONDS)
    speeds = {name: rows * layer.calls / statistics.median(seconds[name]) for name in ("ours", "theirs")}
    return speeds | {"rows": rows, "limit_share": statistics.median(seconds["shares"])}


def _check_equal(ours: OurLayer, theirs: TheirLayer, layer: Layer, tolerance: float) -> None:
    ours.run(layer, 0)
    theirs.run(layer, 0)
    a, b = ours.output(layer), theirs.output()
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    if not error < tolerance:
        raise KernelError(f"the two layers differ by {error:.1%} of the norm at {layer.rows} rows, so neither is timed")


def _timed(side: OurLayer | TheirLayer, layer: Layer) -> float:
    start = time.perf_counter()
    for call in range(layer.calls):
        side.run(layer, call)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1:])
