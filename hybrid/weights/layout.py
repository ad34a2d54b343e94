"""The packed layout: which tensors a store holds for a spec and a mix of formats, and where an expert's parts lie.

A matrix W [n outputs, k inputs] is packed as blocks of 16 output columns, each a header of scales and a stream of
64-byte lines, so that one line is one vector operand and the kernels of every instruction set stream it in order
(`formats/` has a file for each format). n is padded to 16 and k to 64. The gate and up matrices of an expert are
interleaved by block (gate 0, up 0, gate 1, ...), and followed by its down matrix: one expert is one contiguous blob.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK as BLOCK
from hybrid.formats.block import K_ALIGN as K_ALIGN
from hybrid.formats.block import Array, Bytes
from hybrid.formats.block import round_up as round_up
from hybrid.formats.mix import FormatMix
from hybrid.models.spec import FeedForwardSpec, LayerSpec, ModelSpec

LAYOUT_VERSION = 3

StoreDtype = Literal["U8", "F32"]


@dataclass(frozen=True)
class Run:
    """`count` packed blocks in a row, each of `inputs` (padded) inputs."""

    inputs: int
    count: int


@dataclass(frozen=True)
class StoreTensor:
    """One tensor of a store. `shape` is that of the stored (packed, padded) array.

    format: that of a packed matrix, whose bytes are U8, or None for plain F32 values. runs: the blocks of a packed
    tensor, or of each expert.
    """

    name: str
    shape: tuple[int, ...]
    dtype: StoreDtype
    shard: str
    format: str | None = None
    runs: tuple[Run, ...] = ()

    @property
    def nbytes(self) -> int:
        size = {"U8": 1, "F32": 4}[self.dtype]
        return int(np.prod(self.shape, dtype=np.int64)) * size


def packed_bytes(format: str, n: int, k: int) -> int:
    """Bytes of a packed [n, k] matrix."""
    return _bytes(format, (_run(n, k),))


def expert_bytes(format: str, hidden: int, intermediate: int) -> int:
    """Bytes of one expert's blob: gate and up, then down."""
    return _bytes(format, expert_runs(hidden, intermediate))


def down_offset(format: str, hidden: int, intermediate: int) -> int:
    """Bytes from the start of an expert's blob to its down matrix."""
    return 2 * packed_bytes(format, intermediate, hidden)


def expert_runs(hidden: int, intermediate: int) -> tuple[Run, ...]:
    """The blocks of an expert: gate and up interleaved, then down."""
    gate_up, down = _run(intermediate, hidden), _run(hidden, intermediate)
    return Run(gate_up.inputs, 2 * gate_up.count), down


def pack_gate_up(format: str, gate: Array, up: Array) -> Bytes:
    """Gate and up [n, k] as blocks, interleaved: gate 0, up 0, gate 1, ..."""
    return interleave(FORMATS[format].pack(gate), FORMATS[format].pack(up))


def interleave(gate: Bytes, up: Bytes) -> Bytes:
    """Packed blocks of gate and of up, in turn."""
    return np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])


def pack_expert(format: str, gate: Array, up: Array, down: Array) -> Bytes:
    """One expert's blob, [expert_bytes], of gate, up [intermediate, hidden] and down [hidden, intermediate]."""
    return np.concatenate([pack_gate_up(format, gate, up).reshape(-1), FORMATS[format].pack(down).reshape(-1)])


def qkv_width(layer: LayerSpec) -> int:
    """Rows of the fused q, k, v projection: all query heads, then key heads, then value heads."""
    attention = layer.attention
    return (attention.heads + 2 * attention.kv_heads) * attention.head_dim


def shares_head(spec: ModelSpec, mix: FormatMix) -> bool:
    """Whether one packed matrix serves as embedding and head: a tied model with a head of bf16, as embeddings are."""
    return spec.tied and mix.head == "bf16"


def store_tensors(spec: ModelSpec, mix: FormatMix) -> list[StoreTensor]:
    """Every tensor of the store of `spec`, in store order: for the packer to write, the planner to count."""
    layers = [tensor for index in range(len(spec.layers)) for tensor in layer_tensors(spec, index, mix)]
    return [*outer_tensors(spec, mix), *layers]


def outer_tensors(spec: ModelSpec, mix: FormatMix) -> Iterator[StoreTensor]:
    """Tensors outside the layers. There is a head unless `shares_head`."""
    make = _Maker("outer")
    yield make.matrix("embedding", "bf16", spec.vocab, spec.hidden)
    yield make.floats("final_norm", spec.hidden)
    if not shares_head(spec, mix):
        yield make.matrix("head", mix.head, spec.vocab, spec.hidden)


def layer_tensors(spec: ModelSpec, index: int, mix: FormatMix) -> Iterator[StoreTensor]:
    """Tensors of one layer, in the order in which a step reads them."""
    layer, make = spec.layers[index], _Maker(f"layer-{index:05d}", f"layers.{index}.")
    yield from _attention_tensors(make, layer, spec.hidden, mix)
    yield make.floats("ffn.norm", spec.hidden)
    yield from _feed_forward_tensors(make, layer.feed_forward, spec.hidden, mix)


def _attention_tensors(make: _Maker, layer: LayerSpec, hidden: int, mix: FormatMix) -> Iterator[StoreTensor]:
    attention, width = layer.attention, qkv_width(layer)
    yield make.floats("attention.norm", hidden)
    yield make.matrix("attention.qkv", mix.attention, width, hidden)
    if attention.qkv_bias:
        yield make.floats("attention.qkv_bias", round_up(width, BLOCK))
    if attention.qk_norm == "head":
        yield make.floats("attention.q_norm", attention.head_dim)
        yield make.floats("attention.k_norm", attention.head_dim)
    if attention.sinks:
        yield make.floats("attention.sinks", attention.heads)
    yield make.matrix("attention.out", mix.attention, hidden, attention.heads * attention.head_dim)
    if attention.out_bias:
        yield make.floats("attention.out_bias", round_up(hidden, BLOCK))


def _feed_forward_tensors(make: _Maker, ffn: FeedForwardSpec, hidden: int, mix: FormatMix) -> Iterator[StoreTensor]:
    experts, scores = max(1, ffn.experts), ffn.experts + ffn.shared_gate  # the gate of a shared expert is a last row
    if ffn.is_moe:
        yield make.floats("ffn.router", scores, hidden)
    if ffn.router and ffn.router.bias:
        yield make.floats("ffn.router_bias", scores)
    yield make.experts("ffn.experts", mix.experts if ffn.is_moe else mix.dense, hidden, ffn.intermediate, experts)
    if ffn.bias:
        blocks = round_up(ffn.intermediate, BLOCK) // BLOCK
        yield make.floats("ffn.gate_up_bias", experts, blocks, 2, BLOCK)
        yield make.floats("ffn.down_bias", experts, round_up(hidden, BLOCK))
    if ffn.shared_intermediate:
        yield make.experts("ffn.shared", mix.shared, hidden, ffn.shared_intermediate)


@dataclass(frozen=True)
class _Maker:
    """Store tensors of one shard."""

    shard: str
    prefix: str = ""

    def floats(self, name: str, *shape: int) -> StoreTensor:
        return StoreTensor(self.prefix + name, shape, "F32", self.shard)

    def matrix(self, name: str, format: str, n: int, k: int) -> StoreTensor:
        runs = (_run(n, k),)
        return StoreTensor(self.prefix + name, (_bytes(format, runs),), "U8", self.shard, format, runs)

    def experts(self, name: str, format: str, hidden: int, intermediate: int, *count: int) -> StoreTensor:
        runs = expert_runs(hidden, intermediate)
        return StoreTensor(self.prefix + name, (*count, _bytes(format, runs)), "U8", self.shard, format, runs)


def _run(n: int, k: int) -> Run:
    return Run(round_up(k, K_ALIGN), round_up(n, BLOCK) // BLOCK)


def _bytes(format: str, runs: tuple[Run, ...]) -> int:
    return sum(run.count * FORMATS[format].block_bytes(run.inputs) for run in runs)
