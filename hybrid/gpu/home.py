"""Keys and values as the threads keep them, read back for a mirror that has not seen them being made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hybrid.formats.block import BLOCK, round_up
from hybrid.gpu.link import Link
from hybrid.machine.memory import view
from hybrid.plan.kv_layout import KvPlan

_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SCALE = 4  # bytes
_PAIR, _FOUR = 2, 4  # of bf16 two dimensions of a key lie together, or two tokens' values; of bytes four tokens' values


class Home:
    """The states of one layer, as its attention lays them out; see `hybrid.plan.kv_layout`.

    address: of the states of all sequences, which outlive this.
    """

    def __init__(self, plan: KvPlan, layer: int, address: int, link: Link) -> None:
        state = plan.layers[layer]
        self._fields, self._dtype, self._link = state.fields, _DTYPES[plan.format], link
        self._address, self._stride = address + plan.offsets[layer], plan.sequence_stride
        heads = state.nbytes // (self._fields["head_stride"] or state.nbytes)
        self._shape = heads, state.nbytes // heads

    def keys(self, sequence: int, start: int, end: int) -> Tensor:
        """Those of the tokens from `start` to `end`, on the device: [tokens, heads, dim], padded, bf16 or float32. Of
        attention over latents they are the rows of tokens, of one head.
        """
        return self._rows("key", _keys_of, 0, sequence, start, end)

    def values(self, sequence: int, start: int, end: int) -> Tensor:
        """The same of values, which are no rows of their own in attention over latents."""
        return self._rows("value", _values_of, self._fields["value_offset"], sequence, start, end)

    def _rows(
        self, which: str, unpack: Callable[[Tensor, int], Tensor], offset: int, sequence: int, start: int, end: int
    ) -> Tensor:
        first, last, dim = start // BLOCK * BLOCK, round_up(end, BLOCK), self._fields[f"{which}_dim"]
        size = dim * self._dtype.itemsize
        rows = unpack(self._read(sequence, offset, size, first, last).view(self._dtype), dim)
        if scales := self._fields[f"{which}_scales_offset"]:
            factors = self._read(sequence, scales, _SCALE, first, last).view(torch.float32)
            rows = rows.float() * factors[..., None]
        return rows[:, start - first : end - first].transpose(0, 1)

    def _read(self, sequence: int, offset: int, size: int, first: int, last: int) -> Tensor:
        """A run, where a token has `size` bytes, of every head: uint8 [heads, bytes]."""
        state = view(self._address + sequence * self._stride, self._shape, np.uint8)
        run = np.ascontiguousarray(state[:, offset + first * size : offset + last * size])
        return self._link.to_device(torch.from_numpy(run))


def _keys_of(codes: Tensor, dim: int) -> Tensor:
    """[heads, tokens, dim] of lines [16 tokens][2 dimensions] of bf16, or [1 dimension][16 tokens] of bytes."""
    together = _PAIR if codes.dtype == torch.bfloat16 else 1
    lines = codes.reshape(len(codes), -1, dim // together, BLOCK, together)
    return lines.transpose(2, 3).reshape(len(codes), -1, dim)


def _values_of(codes: Tensor, dim: int) -> Tensor:
    """[heads, tokens, dim] of lines [16 dimensions][2 tokens] of bf16, or [4 tokens][16 dimensions] of bytes."""
    if codes.dtype == torch.bfloat16:
        return codes.reshape(len(codes), -1, dim, _PAIR).transpose(2, 3).reshape(len(codes), -1, dim)
    lines = codes.reshape(len(codes), -1, dim // BLOCK, _FOUR, BLOCK)
    return lines.transpose(2, 3).reshape(len(codes), -1, dim)
