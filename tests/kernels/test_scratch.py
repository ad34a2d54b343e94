"""Scratch is as large as each op says, for machines that are not this one too, and an op never gets less.

All tests of kernels see that no op writes more: `Rig` has exactly the scratch that is stated, and behind it memory that
may not be touched. Of AMX tests/amx/guard.h sees it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rig import BF16, aligned, format_of, packed, row_stride
from test_op_fields import OPS

import cpu_kernels
from cpu_kernels import ExpertSet
from hybrid.formats import GROUPED

BLOCKS = {"portable": 2, "avx2": 2, "avx512": 2, "avx512_bf16": 4, "amx": 4}  # that are multiplied together
OPENED = (
    "int4",
    "fp8",
    "fp8_row",
    "mxfp4",
    "nvfp4",
    *GROUPED,
)  # formats whose lines are opened to panels, of 8 KiB a block
PRODUCTS = ("gemm", "head_gemm", "gate_up", "down")
STRIDES = {"input_stride": 4096, "expert_stride": 1 << 20}  # for as many inputs as are tried here


def stated(op: str, isa: str, rows: int, **changes: Any) -> int:
    nowhere = {name: 0 for name in OPS[op] if isinstance(OPS[op][name], int) and OPS[op][name] == OPS["embed"]["table"]}
    strides = {name: stride for name, stride in STRIDES.items() if name in OPS[op]}
    return int(cpu_kernels.scratch_bytes(op, isa, rows, **OPS[op] | nowhere | strides | changes))


# Inputs and bytes of a strip, 32 rows as tiles multiply them: 512 bytes of each row; and of whole numbers two terms of
# each row for every scale that it has. nvfp4 is not multiplied by tiles.
STRIPS = dict.fromkeys(("bf16", "fp8", "fp8_row", "mxfp4", *GROUPED), (256, 32 * 512 + 64)) | dict.fromkeys(
    ("int8", "int4"), (512, 32 * (512 + 2 * 8))
)


def product(isa: str, format: str, rows: int, inputs: int = 192) -> int:
    """Sums and panels; where there are tiles, of 16 blocks and of whole tiles of up to 512 rows, and their copies."""
    panel = 8192 if format in OPENED else 0
    plain = BLOCKS[isa] * (rows * 64 + panel)
    if isa != "amx" or format not in STRIPS:
        return plain
    band, (width, strip) = min(512, rows), STRIPS[format]
    return max(plain, 16 * (-(-band // 16) * 16 * 64 + panel) + -(-band // 32) * -(-inputs // width) * strip)


@pytest.mark.parametrize("isa", BLOCKS)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 513, 4096])
@pytest.mark.parametrize("inputs", [192, 640])
def test_products_need_sums_panels_and_copies(isa, format, rows, inputs) -> None:
    for op in ("gemm", "gate_up", "down"):
        expected = product(isa, format, rows, inputs)
        assert stated(op, isa, rows, format=format_of(format), inputs=inputs) == expected
        assert stated(op, isa, rows, format=format_of(format), inputs=inputs, node=1) == expected


@pytest.mark.parametrize("isa", BLOCKS)
@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_a_shared_expert_may_need_more(isa, op) -> None:
    fields = {name: OPS[op][name] for name in ("routing", "bias", "blocks")} | STRIDES
    shared = ExpertSet(**fields, input=0, experts=0, format=format_of("fp8"), inputs=640)
    assert stated(op, isa, 60, inputs=64) < product(isa, "fp8", 60, 640)
    assert stated(op, isa, 60, inputs=64, shared=shared) == product(isa, "fp8", 60, 640)


@pytest.mark.parametrize("isa", BLOCKS)
@pytest.mark.parametrize(("heads", "rows", "together"), [(4, 100, 96), (4, 5, 10), (10, 100, 95), (200, 1, 100)])
def test_attention_needs_scores_weights_and_two_states_of_a_tile(isa, heads, rows, together) -> None:
    """Of `together` rows times heads a KV head: at most 96 unless one row has more."""
    expected = together * (256 * (4 + 2) + 2 * 4 * (64 + 16))
    assert stated("attention", isa, rows, heads=heads) == expected
    pages = {"base": 0, "sequence_stride": 0, "head_stride": 0, "value_offset": 0, "value_dim": 64}
    for format, dim in (("int8", 64), ("fp8", 512)):
        scales = {"key_scales_offset": 0, "value_scales_offset": 0}
        kv = cpu_kernels.KvLayout(**pages, **scales, key_dim=dim, format=format_of(format))
        opened = BLOCKS[isa] * 16 * max(dim, 256) * 2
        assert stated("attention", isa, rows, heads=heads, kv=kv) == expected + opened


def test_what_sees_selected_keys_needs_a_block_of_them_more() -> None:
    pages = {"base": 0, "sequence_stride": 0, "head_stride": 0, "value_offset": 0, "key_dim": 96, "value_dim": 64}
    for format, size in (("bf16", 2), ("int8", 1), ("fp8", 1)):
        scales = {"key_scales_offset": 0, "value_scales_offset": 0}
        kv = cpu_kernels.KvLayout(**pages, **scales, shared=True, format=format_of(format))
        fields = {"heads": 4, "kv_heads": 1, "kv": kv}
        gathered = stated("attention", "amx", 5, **fields, selects=20) - stated("attention", "amx", 5, **fields)
        assert gathered == 256 * (96 * size + 4)


def test_scores_of_an_indexer_need_those_of_its_heads() -> None:
    for isa in BLOCKS:
        assert stated("index_scores", isa, 1000, heads=7) == 7 * 256 * 4
        assert stated("block_scores", isa, 1000, heads=7) == 7 * 256 * 4
        assert stated("entry_scores", isa, 1000, heads=7) == 7 * 256 * 4 + 256 * 32 * 2  # and a block of entries


@pytest.mark.parametrize(
    "op", [op for op in OPS if op not in (*PRODUCTS, "attention", "index_scores", "entry_scores", "block_scores")]
)
def test_other_ops_need_none(op) -> None:
    assert stated(op, "amx", 1000) == 0


@pytest.mark.parametrize("op", [*PRODUCTS, "attention", "index_scores", "entry_scores", "block_scores"])
def test_an_op_is_refused_with_less_than_it_needs(isa, op) -> None:
    def add(scratch: int) -> None:
        executor = cpu_kernels.Executor(
            isa=isa, pool=cpu_kernels.ThreadPool(2, []), rows=9, sequences=1, positions=9, vocab=40,
            scratch_bytes=scratch,
        )  # fmt: skip
        getattr(executor, op)(part=cpu_kernels.Part.other, **OPS[op])

    needed = stated(op, isa, 9)
    add(needed)
    for given in (0, needed - 1):
        message = f"^{op}: {needed} bytes of scratch are needed, {given} are given$"
        with pytest.raises(ValueError, match=message):
            add(given)


def test_what_cannot_be_asked_for_is_refused() -> None:
    with pytest.raises(ValueError, match="'sse9' is unknown"):
        stated("gemm", "sse9", 1)
    with pytest.raises(ValueError, match="rows is 0; it must be at least 1"):
        stated("gemm", "amx", 0)
    with pytest.raises(ValueError, match="gemm: columns is -1"):
        stated("gemm", "amx", 1, columns=-1)
    with pytest.raises(TypeError, match="gemm has no colour"):
        stated("gemm", "amx", 1, colour=1)


def test_threads_have_scratch_of_their_own(isa) -> None:
    """An odd number of bytes for each; two threads write the sums of one product."""
    x, weight = aligned((9, 64), BF16, 1), np.ones((640, 64), BF16)
    output = aligned((9, row_stride(640)), np.float32)
    executor = cpu_kernels.Executor(
        isa=isa, pool=cpu_kernels.ThreadPool(3, []), rows=9, sequences=1, positions=9, vocab=1,
        scratch_bytes=stated("gemm", isa, 9, format=format_of("bf16")) + 1,
    )  # fmt: skip
    blocks = packed("bf16", weight)[0]
    for _ in range(20):
        executor.gemm(
            part=cpu_kernels.Part.other, format=format_of("bf16"), input=x.ctypes.data, weight=blocks.ctypes.data,
            bias=0, output=output.ctypes.data, columns=640, inputs=64, input_stride=128, output_stride=640,
            accumulate=True,
        )  # fmt: skip
    zeros, none = np.zeros(9, np.int32), np.zeros(0, np.int32)
    executor.step(zeros, zeros, np.arange(9, dtype=np.int32), none, np.zeros((0, 1), np.float32))
    assert (output == 20 * 64).all()
