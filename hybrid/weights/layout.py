"""The packed layout: which tensors a store holds for a spec, and how a matrix is laid out for the kernels.

A matrix W [n, k] (n outputs, k inputs) is packed as blocks of 16 output columns, each a contiguous stream of
lines:

    packed[n / 16][k / 2][16][2]      line = 16 columns x one pair of inputs = 64 bytes of bf16

so that one line is one vector operand of a bf16 dot product, and the kernels of every instruction set stream
it in order. n is padded to 16 and k to 32, with zeros. The gate and up matrices of an expert are interleaved
by block (gate 0, up 0, gate 1, ...), and followed by its down matrix: one expert is one contiguous blob.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hybrid.models.spec import LayerSpec, ModelSpec

LAYOUT_VERSION = 1
BLOCK = 16  # output columns in a block
K_ALIGN = 32  # inputs are padded to this
FORMATS = ("bf16",)

StoreDtype = Literal["BF16", "F32"]


@dataclass(frozen=True)
class StoreTensor:
    """One tensor of a store. `role` names what it is; shape is that of the stored (packed, padded) array."""

    name: str
    shape: tuple[int, ...]
    dtype: StoreDtype
    shard: str

    @property
    def nbytes(self) -> int:
        size = {"BF16": 2, "F32": 4}[self.dtype]
        return int(np.prod(self.shape, dtype=np.int64)) * size


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def packed_elements(n: int, k: int) -> int:
    """How many bf16 elements a packed [n, k] matrix takes."""
    return round_up(n, BLOCK) * round_up(k, K_ALIGN)


def expert_elements(hidden: int, intermediate: int) -> int:
    """How many bf16 elements one expert's blob takes: gate and up, then down."""
    return 2 * packed_elements(intermediate, hidden) + packed_elements(hidden, intermediate)


def down_offset(hidden: int, intermediate: int) -> int:
    """Elements from the start of an expert's blob to its down matrix."""
    return 2 * packed_elements(intermediate, hidden)


def pack_matrix(weight: npt.NDArray[np.generic]) -> npt.NDArray[np.uint16]:
    """Pack W [n, k] of bf16, fp16 or fp32 into [n/16, k/2, 16, 2] bf16 bit patterns (uint16), zero-padded."""
    n, k = weight.shape
    bits = np.ascontiguousarray(weight.astype(ml_dtypes.bfloat16, copy=False)).view(np.uint16)
    pad = (round_up(n, BLOCK) - n, round_up(k, K_ALIGN) - k)
    if any(pad):
        bits = np.pad(bits, ((0, pad[0]), (0, pad[1])))
    pairs = bits.view(np.uint32).reshape(bits.shape[0] // BLOCK, BLOCK, bits.shape[1] // 2)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1)).view(np.uint16).reshape(len(pairs), -1, BLOCK, 2)


def unpack_matrix(packed: npt.NDArray[np.uint16], n: int, k: int) -> npt.NDArray[np.float32]:
    """The inverse of `pack_matrix`, as float32 [n, k]; for tests and checks."""
    blocks = packed.reshape(round_up(n, BLOCK) // BLOCK, round_up(k, K_ALIGN) // 2, BLOCK, 2)
    rows = blocks.transpose(0, 2, 1, 3).reshape(round_up(n, BLOCK), round_up(k, K_ALIGN))
    values: npt.NDArray[np.float32] = np.ascontiguousarray(rows[:n, :k]).view(ml_dtypes.bfloat16).astype(np.float32)
    return values


def pack_gate_up(gate: npt.NDArray[np.generic], up: npt.NDArray[np.generic]) -> npt.NDArray[np.uint16]:
    """Gate and up [n, k], packed and interleaved by block: gate 0, up 0, gate 1, ..."""
    return np.stack([pack_matrix(gate), pack_matrix(up)], axis=1)


def pack_expert(
    gate: npt.NDArray[np.generic], up: npt.NDArray[np.generic], down: npt.NDArray[np.generic]
) -> npt.NDArray[np.uint16]:
    """One expert's blob, flat uint16 [expert_elements], from gate, up [intermediate, hidden] and down."""
    return np.concatenate([pack_gate_up(gate, up).reshape(-1), pack_matrix(down).reshape(-1)])


def all_finite(values: npt.NDArray[np.generic]) -> bool:
    """Whether no value is NaN or infinite, of float32, float16, bf16 or bf16 bit patterns (uint16)."""
    kind = values.dtype
    exponent = {np.dtype(np.float32): 0x7F80_0000, np.dtype(np.float16): 0x7C00}.get(kind, 0x7F80)
    bits: npt.NDArray[Any] = values.view(np.uint32 if kind.itemsize == 4 else np.uint16)
    return bits.size == 0 or bool(np.max(bits & exponent) < exponent)


def outer_tensors(spec: ModelSpec) -> Iterator[StoreTensor]:
    """Tensors outside the layers. A tied model has one packed matrix that serves as embedding and head."""
    packed = (packed_elements(spec.vocab, spec.hidden),)
    yield StoreTensor("embedding", packed, "BF16", "outer")
    yield StoreTensor("final_norm", (spec.hidden,), "F32", "outer")
    if not spec.tied:
        yield StoreTensor("head", packed, "BF16", "outer")


def layer_tensors(spec: ModelSpec, index: int) -> Iterator[StoreTensor]:
    """Tensors of one layer, in the order in which a step reads them."""
    layer, shard, prefix = spec.layers[index], f"layer-{index:05d}", f"layers.{index}"

    def tensor(name: str, dtype: StoreDtype, *shape: int) -> StoreTensor:
        return StoreTensor(f"{prefix}.{name}", shape, dtype, shard)

    attention, width = layer.attention, qkv_width(layer)
    yield tensor("attention.norm", "F32", spec.hidden)
    yield tensor("attention.qkv", "BF16", packed_elements(width, spec.hidden))
    if attention.qkv_bias:
        yield tensor("attention.qkv_bias", "F32", round_up(width, BLOCK))
    if attention.qk_norm == "head":
        yield tensor("attention.q_norm", "F32", attention.head_dim)
        yield tensor("attention.k_norm", "F32", attention.head_dim)
    yield tensor("attention.out", "BF16", packed_elements(spec.hidden, attention.heads * attention.head_dim))
    if attention.out_bias:
        yield tensor("attention.out_bias", "F32", round_up(spec.hidden, BLOCK))

    ffn = layer.feed_forward
    yield tensor("ffn.norm", "F32", spec.hidden)
    if ffn.is_moe:
        yield tensor("ffn.router", "F32", ffn.experts, spec.hidden)
    yield tensor("ffn.experts", "BF16", max(1, ffn.experts), expert_elements(spec.hidden, ffn.intermediate))


def qkv_width(layer: LayerSpec) -> int:
    """Rows of the fused q, k, v projection: all query heads, then key heads, then value heads."""
    attention = layer.attention
    return (attention.heads + 2 * attention.kv_heads) * attention.head_dim


def store_tensors(spec: ModelSpec) -> list[StoreTensor]:
    """Every tensor of the store of `spec`, in store order: for the packer to write, the planner to count."""
    tensors = [t for i in range(len(spec.layers)) for t in layer_tensors(spec, i)]
    return list(outer_tensors(spec)) + tensors
