"""Opens packed tensors of the store and puts them on the device: matrices as bf16, all else as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK, round_up
from hybrid.formats.packed import down_offset, matrix_formats
from hybrid.gpu.parts import GatedWeights, NormWeights
from hybrid.models.tensors import StoreTensor

CHUNK_BLOCKS = 512  # blocks of 16 outputs opened at a time: what one takes as fp32 is all that is needed beside them

Read = Callable[[str], npt.NDArray[np.generic]]  # a tensor of the store by name, as its bytes or float32


class Loader:
    """Tensors of the store, on the device."""

    def __init__(self, hidden: int, tensors: Mapping[str, StoreTensor], read: Read, device: torch.device) -> None:
        self._hidden, self._tensors, self._read, self._device = hidden, tensors, read, device

    def floats(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self._read(name), np.float32)).to(self._device)

    def some_floats(self, name: str, count: int | None = None) -> Tensor | None:
        """Without the padding of a bias; None where the model has none."""
        return self.floats(name)[:count] if name in self._tensors else None

    def norm(self, name: str) -> NormWeights:
        """Of the residual stream."""
        return NormWeights(self.floats(name), self.some_floats(f"{name}_bias"))

    def matrix(self, name: str, n: int, k: int) -> Tensor:
        return self._open(self._format(name), self._read(name).reshape(-1), n, k)

    def of_heads(self, name: str, heads: int, n: int, k: int) -> Tensor:
        """bf16 [heads, n, k] of a matrix for each head."""
        format, packed = self._format(name), self._read(name).reshape(heads, -1)
        return torch.stack([self._open(format, one, n, k) for one in packed])

    def gated(self, name: str, n: int) -> GatedWeights:
        """Blocks of gate and of up alternate; down follows."""
        format, k, blob = self._format(name), self._hidden, self._read(name).reshape(-1)
        start, (first, second) = down_offset(format, k, n), matrix_formats(format)
        pairs = blob[:start].reshape(round_up(n, BLOCK) // BLOCK, 2, -1)
        gate, up = (self._open(first, pairs[:, i], n, k) for i in (0, 1))
        return GatedWeights(gate, up, self._open(second, blob[start:], k, n))

    def biased(self, weights: GatedWeights, at: str, n: int) -> GatedWeights:
        """The same with the biases of a dense feed-forward, if it has them; blocks of gate and of up alternate."""
        both, down = self.some_floats(f"{at}.gate_up_bias"), self.some_floats(f"{at}.down_bias")
        if both is None or down is None:
            return weights
        gate, up = (both[0, :, i].flatten()[:n] for i in (0, 1))
        return replace(weights, gate_bias=gate, up_bias=up, down_bias=down[0, : self._hidden])

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
