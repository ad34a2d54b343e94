"""The weights of a step that are not experts, opened from the packed store and put on the device as bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybrid.formats import FORMATS
from hybrid.gpu.parts import GatedWeights
from hybrid.models.spec import FeedForwardSpec, LayerSpec, ModelSpec
from hybrid.weights.layout import BLOCK, StoreTensor, down_offset, qkv_width, round_up

CHUNK_BLOCKS = 512  # blocks of 16 outputs opened at a time: what one takes as fp32 is all that is needed beside them

Read = Callable[[str], npt.NDArray[np.generic]]  # a tensor of the store by name, as its bytes or float32


@dataclass(frozen=True)
class AttentionWeights:
    """norm, q_norm, k_norm, biases and sinks are float32, matrices bf16 [outputs, inputs]."""

    norm: Tensor
    qkv: Tensor
    out: Tensor
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    sinks: Tensor | None


@dataclass(frozen=True)
class FeedForwardWeights:
    """dense: the whole feed-forward of a layer without a router. shared: the expert that all rows share.

    router: float32 [experts, hidden], behind them the gate of the shared expert if it has one.
    """

    norm: Tensor
    dense: GatedWeights | None
    shared: GatedWeights | None
    router: Tensor | None
    router_bias: Tensor | None


@dataclass(frozen=True)
class DeviceWeights:
    """head: the embedding itself where both are one."""

    embedding: Tensor
    final_norm: Tensor
    head: Tensor
    attention: tuple[AttentionWeights, ...]
    feed_forward: tuple[FeedForwardWeights, ...]


def load_weights(spec: ModelSpec, tensors: dict[str, StoreTensor], read: Read, device: torch.device) -> DeviceWeights:
    """tensors: those of the store. Raises torch's out-of-memory error where the device has no room for them."""
    load = _Loader(spec, tensors, read, device)
    embedding = load.matrix("embedding", spec.vocab, spec.hidden)
    return DeviceWeights(
        embedding,
        load.floats("final_norm"),
        load.matrix("head", spec.vocab, spec.hidden) if "head" in tensors else embedding,
        tuple(load.attention(index, layer) for index, layer in enumerate(spec.layers)),
        tuple(load.feed_forward(index, layer.feed_forward) for index, layer in enumerate(spec.layers)),
    )


class _Loader:
    def __init__(self, spec: ModelSpec, tensors: dict[str, StoreTensor], read: Read, device: torch.device) -> None:
        self._hidden, self._tensors, self._read, self._device = spec.hidden, tensors, read, device

    def attention(self, index: int, layer: LayerSpec) -> AttentionWeights:
        at, width, hidden = f"layers.{index}.attention", qkv_width(layer), self._hidden
        return AttentionWeights(
            norm=self.floats(f"{at}.norm"),
            qkv=self.matrix(f"{at}.qkv", width, hidden),
            out=self.matrix(f"{at}.out", hidden, layer.attention.heads * layer.attention.head_dim),
            qkv_bias=self.some_floats(f"{at}.qkv_bias", width),
            out_bias=self.some_floats(f"{at}.out_bias", hidden),
            q_norm=self.some_floats(f"{at}.q_norm"),
            k_norm=self.some_floats(f"{at}.k_norm"),
            sinks=self.some_floats(f"{at}.sinks"),
        )

    def feed_forward(self, index: int, ffn: FeedForwardSpec) -> FeedForwardWeights:
        at = f"layers.{index}.ffn"
        return FeedForwardWeights(
            norm=self.floats(f"{at}.norm"),
            dense=None if ffn.is_moe else self._gated(f"{at}.experts", ffn.intermediate),
            shared=self._gated(f"{at}.shared", ffn.shared_intermediate) if ffn.shared_intermediate else None,
            router=self.some_floats(f"{at}.router"),
            router_bias=self.some_floats(f"{at}.router_bias"),
        )

    def floats(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self._read(name), np.float32)).to(self._device)

    def some_floats(self, name: str, count: int | None = None) -> Tensor | None:
        """Without the padding of a bias; None where the model has none."""
        return self.floats(name)[:count] if name in self._tensors else None

    def matrix(self, name: str, n: int, k: int) -> Tensor:
        return self._open(self._format(name), self._read(name).reshape(-1), n, k)

    def _gated(self, name: str, n: int) -> GatedWeights:
        """Blocks of gate and of up alternate; down follows."""
        format, k, blob = self._format(name), self._hidden, self._read(name).reshape(-1)
        start = down_offset(format, k, n)
        pairs = blob[:start].reshape(round_up(n, BLOCK) // BLOCK, 2, -1)
        gate, up = (self._open(format, pairs[:, i], n, k) for i in (0, 1))
        return GatedWeights(gate, up, self._open(format, blob[start:], k, n))

    def _format(self, name: str) -> str:
        format = self._tensors[name].format
        assert format is not None, f"{name} is no matrix"
        return format

    def _open(self, format: str, packed: npt.NDArray[np.generic], n: int, k: int) -> Tensor:
        """bf16 [n, k] of packed blocks."""
        blocks = packed.reshape(round_up(n, BLOCK) // BLOCK, -1)
        whole = torch.empty(n, k, dtype=torch.bfloat16, device=self._device)
        for first in range(0, len(blocks), CHUNK_BLOCKS):
            rows = slice(first * BLOCK, min(n, (first + CHUNK_BLOCKS) * BLOCK))
            some = FORMATS[format].unpack(blocks[first : first + CHUNK_BLOCKS], rows.stop - rows.start, k)
            whole[rows] = torch.from_numpy(some).bfloat16().to(self._device)
        return whole
