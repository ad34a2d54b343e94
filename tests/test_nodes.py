"""On several memory nodes every node computes its part of an op, and the parts make the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from rig import BF16, Rig, aligned, format_of, packed, padded, random_bf16, row_stride, rows_of

import cpu_kernels
from hybrid.formats.block import BLOCK
from hybrid.formats.packed import down_offset, expert_bytes, pack_expert

BEST = cpu_kernels.available_isas()[0]
THREADS = {1: (1, 2), 2: (2, 3, 5), 3: (3, 4, 7)}  # for a number of nodes
SPLITS = [(nodes, threads) for nodes in (2, 3) for threads in THREADS[nodes]]
ROWS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 5, 96, 320, 4, 2


def cut(units: int, nodes: int) -> list[slice]:
    """Contiguous parts, as equal as they can be."""
    edges = [units * i // nodes for i in range(nodes + 1)]
    return [slice(first, last) for first, last in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize(("threads", "nodes"), [(t, n) for t in range(1, 14) for n in range(1, t + 1)])
def test_every_node_gets_a_contiguous_and_nearly_equal_run_of_threads(threads, nodes) -> None:
    pool = cpu_kernels.ThreadPool(threads, [], nodes)
    of = [pool.node_of(thread) for thread in range(threads)]
    counts = np.bincount(of, minlength=nodes)
    assert (pool.size, pool.nodes) == (threads, nodes)
    assert of == sorted(of) and len(counts) == nodes
    assert max(counts) - min(counts) <= 1 and min(counts) >= 1


@pytest.mark.parametrize(
    ("threads", "cpus", "nodes", "message"),
    [
        (2, [], 3, "3 nodes for 2 threads; from 1 to as many as there are threads are allowed"),
        (2, [], 0, "0 nodes for 2 threads"),
        (0, [], 1, "0 threads; there must be at least one"),
        (2, [[0]], 2, "processors of 1 nodes for 2; give those of each, or none"),
    ],
)
def test_pools_that_cannot_be_are_refused(threads, cpus, nodes, message) -> None:
    with pytest.raises(ValueError, match=message):
        cpu_kernels.ThreadPool(threads, cpus, nodes)


def product(rig: Rig, format: str, x: np.ndarray, weight: np.ndarray, output: Any, **more: Any) -> None:
    """x [m, k] times weight [n, k], a product of its own."""
    rows, (blocks, _) = rows_of(format, x), packed(format, weight)
    sizes = {"columns": len(weight), "inputs": row_stride(x.shape[1]), "input_stride": rows.strides[0]}
    stride = output.strides[0] // 4 if isinstance(output, np.ndarray) else rig.vocab
    places = {"format": format_of(format), "input": rows, "weight": blocks, "bias": None, "output": output}
    rig.add("gemm", **places, **sizes, **{"output_stride": stride, "accumulate": False} | more)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("nodes", "threads"), SPLITS)
def test_a_product_split_by_columns_is_the_whole_one(format, nodes, threads) -> None:
    random = np.random.default_rng(nodes)
    x, weight = random_bf16(random, ROWS, HIDDEN), random_bf16(random, 11 * BLOCK + 3, HIDDEN)
    whole, parts = (aligned((ROWS, row_stride(len(weight))), np.float32) for _ in range(2))
    rig = Rig(BEST, threads, nodes=nodes, vocab=len(weight))
    product(rig, format, x, weight, whole)
    columns = [slice(part.start * BLOCK, min(part.stop * BLOCK, len(weight))) for part in cut(12, nodes)]
    for node, part in enumerate(columns):
        product(rig, format, x, weight[part], parts[:, part.start :], node=node)
    for node, part in enumerate(columns):
        product(rig, format, x, weight[part], None, first_column=part.start, node=node)
    logits = rig.run(ROWS, logit_rows=range(ROWS))
    assert rig.executor.op_count == 3
    assert whole.any() and np.array_equal(parts, whole)
    assert np.array_equal(logits, whole[:, : len(weight)])


@dataclass
class Layer:
    """A routed feed-forward [EXPERTS] of random weights, and the arrays that its ops work on."""

    format: str
    seed: int = 0
    x: np.ndarray = field(init=False)
    ids: np.ndarray = field(init=False)
    gates: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        self.x = random_bf16(random, ROWS, HIDDEN)
        self.gate, self.up = (random_bf16(random, EXPERTS, INTERMEDIATE, HIDDEN) for _ in range(2))
        self.down = random_bf16(random, EXPERTS, HIDDEN, INTERMEDIATE)
        self.ids = np.array([random.permutation(EXPERTS)[:TOP_K] for _ in range(ROWS)], np.int32)
        self.gates = random.random((ROWS, TOP_K)).astype(np.float32)
        self.onto = random.standard_normal((ROWS, HIDDEN)).astype(np.float32)

    def packed(self, part: slice) -> np.ndarray:
        """The experts whose intermediate dimension is `part` alone."""
        blobs = [
            pack_expert(self.format, self.gate[e, part], self.up[e, part], self.down[e][:, part]).reshape(-1)
            for e in range(EXPERTS)
        ]
        array = aligned((EXPERTS, len(blobs[0])), np.uint8)
        array[...] = blobs
        return array

    def group(self, rig: Rig) -> cpu_kernels.Routing:
        sizes = {"offsets": EXPERTS + 1, "rows": ROWS * TOP_K, "active": EXPERTS, "count": 1}
        self.routing = {name: aligned(size, np.int32) for name, size in sizes.items()}
        self.routing["weights"] = aligned(ROWS * TOP_K, np.float32)
        routing = cpu_kernels.Routing(**{name: array.ctypes.data for name, array in self.routing.items()})
        rig.add("group", ids=self.ids, weights=self.gates, routing=routing, experts=EXPERTS, top_k=TOP_K)
        return routing

    def add(self, rig: Rig, parts: Sequence[slice], outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """gate_up and down of every part into its own activation and output; returns the activations."""
        routing = self.group(rig)
        nodes = [{"node": node} for node in range(len(parts))] if len(parts) > 1 else [{}]
        sizes = [part.stop - part.start for part in parts]
        rows, blobs = rows_of(self.format, self.x), [self.packed(part) for part in parts]
        activations = [aligned((ROWS * TOP_K, row_stride(size)), BF16) for size in sizes]
        shared = {"format": format_of(self.format), "routing": routing, "bias": None}
        for size, blob, activation, node in zip(sizes, blobs, activations, nodes, strict=True):
            assert blob.shape[1] == expert_bytes(self.format, HIDDEN, size)
            rig.add(
                "gate_up", **shared, **node, input=rows, experts=blob, output=activation, expert_stride=blob.shape[1],
                blocks=-(-size // BLOCK), inputs=row_stride(HIDDEN), input_stride=rows.strides[0],
                output_stride=row_stride(size), activation=cpu_kernels.Activation.silu,
            )  # fmt: skip
        for size, blob, activation, output, node in zip(sizes, blobs, activations, outputs, nodes, strict=True):
            rig.add(
                "down", **shared, **node, input=activation,
                experts=blob.ctypes.data + down_offset(self.format, HIDDEN, size), output=output,
                expert_stride=blob.shape[1], blocks=-(-HIDDEN // BLOCK), inputs=row_stride(size),
                input_stride=activation.strides[0], output_stride=row_stride(HIDDEN),
            )  # fmt: skip
        return activations


def residual(onto: np.ndarray | float = 0) -> np.ndarray:
    rows = aligned((ROWS, row_stride(HIDDEN)), np.float32)
    rows[:, :HIDDEN] = onto
    return rows


def alone(layer: Layer, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """(activation, output) of a part on one node."""
    rig, output = Rig(BEST), residual()
    (activation,) = layer.add(rig, [part], [output])
    rig.run(ROWS)
    return activation[:, : part.stop - part.start], output


def joined(layer: Layer, nodes: int, threads: int, steps: int = 1) -> tuple[np.ndarray, list[np.ndarray]]:
    """(output, activations) of the layer split over nodes, the step run `steps` times from the same residual."""
    rig, output = Rig(BEST, threads, nodes=nodes), residual(layer.onto)
    partials = [residual() for _ in range(nodes)]
    parts = [slice(part.start * 64, part.stop * 64) for part in cut(INTERMEDIATE // 64, nodes)]
    activations = layer.add(rig, parts, partials)
    addresses = [partial.ctypes.data for partial in partials]
    rig.add("join", partials=addresses, output=output, width=HIDDEN, output_stride=row_stride(HIDDEN))
    for _ in range(steps):
        output[:, :HIDDEN] = layer.onto
        rig.run(ROWS)
        assert not any(partial.any() for partial in partials)
    return output, [
        activation[:, : part.stop - part.start] for activation, part in zip(activations, parts, strict=True)
    ]


@pytest.mark.parametrize("nodes", [2, 3])
def test_experts_split_over_nodes_sum_up_to_the_whole_ones(nodes) -> None:
    layer = Layer("bf16")
    whole_activation, whole = alone(layer, slice(0, INTERMEDIATE))
    output, activations = joined(layer, nodes, nodes)
    assert np.array_equal(np.hstack(activations), whole_activation)
    expected = layer.onto + whole[:, :HIDDEN]
    assert np.abs(output[:, :HIDDEN] - expected).max() < 1e-5 * np.abs(expected).max()
    assert not output[:, HIDDEN:].any()


@pytest.mark.parametrize(("nodes", "threads"), SPLITS)
def test_parts_are_added_in_the_order_of_nodes_whatever_the_threads_and_steps_before(nodes, threads) -> None:
    layer = Layer("bf16", seed=nodes)
    expected = residual(layer.onto)
    for part in cut(INTERMEDIATE // 64, nodes):
        expected += alone(layer, slice(part.start * 64, part.stop * 64))[1]
    output, _ = joined(layer, nodes, threads, steps=3)
    assert np.array_equal(output, expected)


@pytest.mark.parametrize(("width", "nodes"), [(1, 1), (16, 2), (77, 3), (96, 16)])
def test_a_join_adds_and_clears_the_rows_of_the_step_alone(isa, width, nodes) -> None:
    stride, random = row_stride(width), np.random.default_rng(width)
    output, *partials = (aligned((4, stride), np.float32) for _ in range(nodes + 1))
    for array in (output, *partials):
        array[...] = random.standard_normal(array.shape)
    expected, before = output[:3, :width].copy(), [array.copy() for array in (output, *partials)]
    for partial in partials:
        expected += partial[:3, :width]
    rig = Rig(isa, threads=2)
    addresses = [partial.ctypes.data for partial in partials]
    rig.add("join", partials=addresses, output=output, width=width, output_stride=stride)
    rig.run(3)
    assert np.array_equal(output[:3, :width], expected)
    for now, then in zip((output, *partials), before, strict=True):
        assert np.array_equal(now[3:], then[3:]) and np.array_equal(now[:, width:], then[:, width:])
    assert not any(partial[:3, :width].any() for partial in partials)


@pytest.mark.parametrize("count", [0, cpu_kernels.MAX_NODES + 1])
def test_a_join_of_too_few_or_many_nodes_is_refused(count) -> None:
    with pytest.raises(
        ValueError, match=f"join: partials has {count} addresses; from 1 to {cpu_kernels.MAX_NODES} are allowed"
    ):
        Rig(BEST).add("join", partials=[0] * count, output=None, width=16, output_stride=16)


class Halves(Rig):
    """Products of two nodes, to be put in any order; each adds 1 to its own output."""

    def __init__(self) -> None:
        super().__init__(BEST, 2, nodes=2, rows=1)
        self.outputs = [aligned((1, 64), np.float32) for _ in range(2)]
        self._one, self._weight = padded(np.ones((1, 1), BF16)), packed("bf16", np.ones((16, 1), BF16))[0]

    def half(self, node: int, op: str = "gemm", part: str = "other") -> None:
        if op == "quantise":
            sizes = {"width": 64, "input_stride": 128, "output_stride": 128, "multiple": 1}
            return self.add(op, part, input=self._one, output=aligned(128, np.uint8), **sizes, node=node)
        sizes = {"columns": 16, "inputs": 64, "input_stride": 128, "output_stride": 64, "accumulate": True}
        places = {"input": self._one, "weight": self._weight, "bias": None, "output": self.outputs[node % 2]}
        self.add(op, part, format=format_of("bf16"), **places, **sizes, node=node)


@pytest.mark.parametrize(
    ("before", "wrong", "message"),
    [
        ([], (1,), "node 1 comes before node 0"),
        ([0, 1], (1,), "node 1 comes before node 0"),
        ([], (2,), "node 2 of 2"),
        ([], (-2,), "node -2 of 2"),
        ([0], (0,), "has work for 1 of 2 nodes: that of node 1 must follow"),
        ([0], (-1,), "has work for 1 of 2 nodes: that of node 1 must follow"),
        ([0], (1, "quantise"), "all nodes of an op do the same kind of work"),
        ([0], (1, "gemm", "moe"), "all nodes of an op do the same kind of work"),
    ],
)
def test_the_nodes_of_an_op_come_in_turn(before, wrong, message) -> None:
    rig = Halves()
    for node in before:
        rig.half(node)
    with pytest.raises(ValueError, match=message):
        rig.half(*wrong)
    for node in (0, 1)[len(before) % 2 :]:
        rig.half(node)
    rig.run(1)
    assert rig.outputs[0][0, 0] == rig.outputs[1][0, 0] >= 1


def test_a_step_without_the_work_of_a_node_is_refused() -> None:
    rig = Halves()
    rig.half(0)
    with pytest.raises(ValueError, match="the last op lacks the work of a node"):
        rig.run(1)
    rig.half(1)
    rig.run(1)


def test_a_cancelled_step_leaves_no_partial_sums_behind() -> None:
    rig, output = Halves(), aligned((1, 64), np.float32)
    addresses = [partial.ctypes.data for partial in rig.outputs]
    for _ in range(2):
        rig.half(0)
        rig.half(1)
        rig.add("join", partials=addresses, output=output, width=16, output_stride=64)
    rig.executor.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        rig.run(1)
    assert output[0, 0] == 2 and not any(partial.any() for partial in rig.outputs)
    rig.run(1)
    assert output[0, 0] == 6


def test_from_one_op_to_the_next_it_takes_a_measurable_time() -> None:
    for threads in (1, 2):
        assert 0 < cpu_kernels.phase_seconds(cpu_kernels.ThreadPool(threads, []), 100) < float("inf")
