"""Parts of packed weights, cut without packing again, stand for the very values of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from rig import Rig, aligned, dequantised_rows, format_of, placed, random_bf16, row_stride, rows_of

import cpu_kernels
from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK, round_up
from hybrid.formats.packed import down_offset, pack_expert
from hybrid.models.tensors import Gated, GatedBiases, GatedNames, Shard, Stacked, StoreTensor
from hybrid.weights.split import (
    column_parts,
    down_part_offset,
    expert_part_bytes,
    held_bytes,
    intermediate_parts,
    part_bytes,
    part_inputs,
    write_part,
)

BEST = cpu_kernels.available_isas()[0]
SIZES = [(40, 320, 2), (16, 300, 2), (50, 384, 3), (131, 700, 3), (33, 2880, 2), (96, 1000, 5)]  # (n, k, nodes)


def random_weight(n: int, k: int) -> np.ndarray:
    """Columns and groups of very different sizes, so that a scale in the wrong place shows."""
    random = np.random.default_rng(n + k)
    sizes = 2.0 ** random.integers(-6, 6, (n, 1)) * np.arange(1, k + 1) / 64  # within what scales of fp16 hold
    return (random.standard_normal((n, k)) * sizes).astype(np.float32)


def matrix(format: str, n: int, k: int) -> StoreTensor:
    return Shard("outer").matrix("m", "head", Stacked(("m",)), format, n, k)


def experts(format: str, count: int, hidden: int, intermediate: int) -> StoreTensor:
    origin = Gated(GatedNames("g", "u", "d"), hidden, intermediate)
    return Shard("layer").experts("e", "experts", origin, format, count)


def test_blocks_are_shared_out_evenly_or_not_at_all() -> None:
    assert column_parts(7, 3) == (range(0, 2), range(2, 4), range(4, 7))
    assert column_parts(2, 3) == ()
    assert intermediate_parts("bf16", 48, 2) == (range(0, 24), range(24, 48))
    assert intermediate_parts("bf16", 19, 3) == (range(0, 4), range(4, 12), range(12, 19))
    assert intermediate_parts("fp8", 19, 3) == (range(0, 8), range(8, 16), range(16, 19))
    assert intermediate_parts("fp8", 16, 3) == intermediate_parts("int4", 8, 3) == ()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k", "nodes"), SIZES)
def test_the_inputs_of_a_cut_matrix_stand_for_those_of_the_whole(format, n, k, nodes) -> None:
    """down: the parts side by side are the whole, exactly."""
    f, inputs = FORMATS[format], round_up(k, 64)
    nodes = min(nodes, -(-k // f.cut_inputs))
    blocks = f.pack(random_weight(n, k))
    whole, found = f.unpack(blocks, n, k), []
    for part in intermediate_parts(format, -(-k // BLOCK), nodes):
        first = part.start * BLOCK
        cut = f.cut(blocks, inputs, first, first + part_inputs(part))
        assert cut.shape == (len(blocks), f.block_bytes(part_inputs(part)))
        found.append(f.unpack(cut, n, min(k - first, len(part) * BLOCK)))
    assert len(found) == nodes and whole.any()
    assert np.array_equal(np.hstack(found), whole)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k", "nodes"), SIZES)
def test_products_with_parts_of_the_inputs_sum_up_to_the_whole_one(format, n, k, nodes) -> None:
    """Each part multiplies its own inputs; int8 activations are quantised part by part, so each has its own scales."""
    f, inputs, x = FORMATS[format], round_up(k, 64), random_bf16(np.random.default_rng(k), 3, k)
    nodes = min(nodes, -(-k // f.cut_inputs))
    blocks = f.pack(random_weight(n, k))
    whole, output = f.unpack(blocks, n, k).astype(np.float64), aligned((3, row_stride(n)), np.float32)
    exact, size = np.zeros((3, n)), np.zeros((3, n))
    rig = Rig(BEST, threads=nodes, nodes=nodes)
    partials = [aligned(output.shape, np.float32) for _ in range(nodes)]
    for node, part in enumerate(intermediate_parts(format, -(-k // BLOCK), nodes)):
        chosen = slice(part.start * BLOCK, min(k, part.stop * BLOCK))
        rows = rows_of(format, x[:, chosen])
        values = dequantised_rows(format, rows, chosen.stop - chosen.start)
        exact += values @ whole[:, chosen].T
        size += np.abs(values) @ np.abs(whole[:, chosen]).T
        first, own = part.start * BLOCK, part_inputs(part)
        rig.add(
            "gemm", format=format_of(format), input=rows, weight=placed(f.cut(blocks, inputs, first, first + own)),
            bias=None, output=partials[node], columns=n, inputs=own, input_stride=rows.strides[0],
            output_stride=output.shape[1], accumulate=False, node=node,
        )  # fmt: skip
    addresses = [partial.ctypes.data for partial in partials]
    rig.add("join", partials=addresses, output=output, width=n, output_stride=output.shape[1])
    rig.run(3)
    assert (np.abs(output[:, :n] - exact) <= 1e-5 * size).all() and output.any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k", "nodes"), SIZES)
def test_columns_of_a_split_matrix_are_those_of_the_whole(format, n, k, nodes) -> None:
    f, tensor = FORMATS[format], matrix(format, n, k)
    blocks = f.pack(random_weight(n, k))
    whole, parts = f.unpack(blocks, n, k), column_parts(len(blocks), nodes)
    assert bool(parts) == (len(blocks) >= nodes)
    assert held_bytes(tensor, {"m": parts}) == blocks.nbytes
    for part in parts:
        out = np.zeros(part_bytes(tensor, part), np.uint8)
        write_part(tensor, blocks.reshape(-1), part, out)
        columns = slice(part.start * BLOCK, min(n, part.stop * BLOCK))
        assert np.array_equal(f.unpack(out, columns.stop - columns.start, k), whole[columns])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("hidden", "intermediate", "nodes"), [(96, 300, 2), (40, 520, 3), (96, 768, 2)])
def test_a_part_of_experts_holds_its_columns_of_gate_and_up_and_its_inputs_of_down(
    format, hidden, intermediate, nodes
) -> None:
    f, tensor = FORMATS[format], experts(format, 3, hidden, intermediate)
    shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    weights = [[random_weight(*shape) * (e + 1) for shape in shapes] for e in range(3)]
    blobs = np.stack([pack_expert(format, *matrices) for matrices in weights])
    parts = intermediate_parts(format, -(-intermediate // BLOCK), nodes)
    assert len(parts) == nodes
    for part in parts:
        out = np.zeros(part_bytes(tensor, part), np.uint8)
        write_part(tensor, blobs, part, out)
        chosen = slice(part.start * BLOCK, min(intermediate, part.stop * BLOCK))
        assert out.nbytes == 3 * expert_part_bytes(tensor, part)
        start, pair = down_part_offset(tensor, part), 2 * f.block_bytes(round_up(hidden, 64))
        for blob, own in zip(blobs, out.reshape(3, -1), strict=True):
            assert np.array_equal(own[:start], blob[part.start * pair : part.stop * pair])
            whole = f.unpack(blob[down_offset(format, hidden, intermediate) :], hidden, intermediate)
            assert np.array_equal(f.unpack(own[start:], hidden, chosen.stop - chosen.start), whole[:, chosen])


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_but_the_scales_of_columns_is_held_twice(format) -> None:
    """int8 has a line of them in each of the 6 blocks of down; fp8 pads its few scales to a line;
    q4_t has a table.
    """
    tensor = experts(format, 3, 96, 768)
    extra = held_bytes(tensor, {"e": intermediate_parts(format, 48, 2)}) - tensor.nbytes
    assert extra == (3 * 6 * 64 if format in ("int8", "fp8", "fp8_row", "nvfp4", "q4_t") else 0)
    assert held_bytes(tensor, {}) == tensor.nbytes


def test_biases_of_gate_and_up_go_with_their_columns() -> None:
    tensor = Shard("layer").floats("b", "experts", GatedBiases(GatedNames("g", "u", "d"), down=False), 3, 19, 2, BLOCK)
    biases = np.arange(3 * 19 * 2 * BLOCK, dtype=np.float32).reshape(tensor.shape)
    for part in intermediate_parts("bf16", 19, 2):
        out = np.zeros(part_bytes(tensor, part), np.uint8)
        write_part(tensor, biases, part, out)
        assert np.array_equal(out.view(np.float32).reshape(3, -1, 2, BLOCK), biases[:, part.start : part.stop])
