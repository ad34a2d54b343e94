"""Keys and values in the layout that the kernels read, for one layer, in every KV format."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from rig import BF16, aligned

import cpu_kernels
from cpu_kernels import KEY_BLOCK
from hybrid.formats.block import BLOCK, round_up
from hybrid.models.layers.grouped_query_shape import KEY_ALIGN

DTYPES = {"bf16": np.dtype(BF16), "int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
LARGEST = {"int8": 127, "fp8": 448}


def quantised(rows: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows [..., dim] in a format, with the float32 scale [...] of each: its largest magnitude becomes the format's."""
    if format == "bf16":
        return rows.astype(BF16), np.ones(rows.shape[:-1], np.float32)
    rows = rows.astype(np.float32)
    largest = np.abs(rows).max(-1)
    factors = np.divide(np.float32(LARGEST[format]), largest, out=np.zeros_like(largest), where=largest > 0)
    units = rows * factors[..., None]
    return (np.rint(units) if format == "int8" else units).astype(DTYPES[format]), largest / np.float32(LARGEST[format])


class KvPages:
    """Zeroed pages of `slots` sequences of up to `tokens` tokens.

    A line of keys is [16 tokens][2 dimensions] of bf16 or [4 dimensions][16 tokens] of bytes; one of values is
    [16 dimensions][2 tokens] or [4 tokens][16 dimensions]. Scales, of bytes alone, are [keys, values][tokens].
    """

    def __init__(
        self, slots: int, heads: int, head_dim: int, tokens: int, format: str = "bf16", value_head_dim: int = 0
    ) -> None:
        """value_head_dim: of values; 0: as many as head_dim."""
        self.heads, self.head_dim, self.format = heads, head_dim, format
        self.key_dim, self.value_dim = round_up(head_dim, KEY_ALIGN), round_up(value_head_dim or head_dim, BLOCK)
        self.tokens = round_up(tokens, KEY_BLOCK)
        self._dtype = DTYPES[format]
        self.value_offset = self.tokens * self.key_dim * self._dtype.itemsize
        self.scales_offset = self.value_offset + self.tokens * self.value_dim * self._dtype.itemsize
        scales = 0 if format == "bf16" else 2 * 4 * self.tokens
        self._pages = aligned((slots, heads, self.scales_offset + scales), np.uint8)
        self.nbytes = self._pages.nbytes
        self._keys = self._pages[..., : self.value_offset].view(self._dtype)
        self._values = self._pages[..., self.value_offset : self.scales_offset].view(self._dtype)
        self._scales = self._pages[..., self.scales_offset :].view(np.float32).reshape(slots, heads, -1, self.tokens)

    @property
    def layout(self) -> cpu_kernels.KvLayout:
        scaled = self.format != "bf16"
        return cpu_kernels.KvLayout(
            base=self._pages.ctypes.data,
            sequence_stride=self._pages.strides[0],
            head_stride=self._pages.strides[1],
            value_offset=self.value_offset,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            format=getattr(cpu_kernels.Format, self.format),
            key_scales_offset=self.scales_offset * scaled,
            value_scales_offset=(self.scales_offset + 4 * self.tokens) * scaled,
        )

    def keys(self, slot: int) -> np.ndarray:
        """A copy [heads, tokens, key_dim], bf16 or dequantised: exact float64."""
        return self._scaled(self._unpacked_keys(slot), slot, 0)

    def values(self, slot: int) -> np.ndarray:
        """A copy [heads, tokens, value_dim], bf16 or dequantised: exact float64."""
        return self._scaled(self._unpacked_values(slot), slot, 1)

    def write(self, slot: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys and values [heads, n, their size] at positions from 0 on, quantised if the format says so."""
        count = keys.shape[1]
        whole = self._unpacked_keys(slot), self._unpacked_values(slot)
        for i, (array, part) in enumerate(zip(whole, (keys, values), strict=True)):
            array[:, :count, : part.shape[2]], scales = quantised(part, self.format)
            if self.format != "bf16":
                self._scales[slot, :, i, :count] = scales
        self._pack(slot, *whole)

    def fill(self, slot: int, value: float) -> None:
        """The same value everywhere, scales too; an int8 has no NaN, but its scale has."""
        codes = np.nan_to_num(value) if self.format == "int8" else value
        self._keys[slot], self._values[slot], self._scales[slot] = codes, codes, value

    def fill_scales(self, slot: int, value: float) -> None:
        """The same scale everywhere; what is stored stays."""
        self._scales[slot] = value

    def codes(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """What is stored, without scales: keys [heads, tokens, key_dim] and values [heads, tokens, value_dim]."""
        return self._unpacked_keys(slot), self._unpacked_values(slot)

    def scales(self, slot: int) -> np.ndarray:
        """A copy [2, heads, tokens]: those of keys, then those of values."""
        return self._scales[slot].swapaxes(0, 1).copy()

    def used(self) -> int:
        """How many (slot, position) hold a key or value that is not zero."""
        slots = range(len(self._pages))
        return sum(int((self.keys(s).any((0, 2)) | self.values(s).any((0, 2))).sum()) for s in slots)

    def _scaled(self, units: np.ndarray, slot: int, which: int) -> np.ndarray:
        if self.format == "bf16":
            return units
        return units.astype(np.float64) * self._scales[slot, :, which, :, None]

    def _unpacked_keys(self, slot: int) -> np.ndarray:
        if self.format == "bf16":
            lines = self._keys[slot].reshape(self.heads, -1, self.key_dim // 2, BLOCK, 2)
            return lines.transpose(0, 1, 3, 2, 4).reshape(self.heads, self.tokens, self.key_dim)
        lines = self._keys[slot].reshape(self.heads, -1, self.key_dim, BLOCK)
        return lines.transpose(0, 1, 3, 2).reshape(self.heads, self.tokens, self.key_dim)

    def _unpacked_values(self, slot: int) -> np.ndarray:
        if self.format == "bf16":
            lines = self._values[slot].reshape(self.heads, -1, self.value_dim, 2)
            return lines.transpose(0, 1, 3, 2).reshape(self.heads, self.tokens, self.value_dim)
        lines = self._values[slot].reshape(self.heads, -1, self.value_dim // BLOCK, 4, BLOCK)
        return lines.transpose(0, 1, 3, 2, 4).reshape(self.heads, self.tokens, self.value_dim)

    def _pack(self, slot: int, keys: np.ndarray, values: np.ndarray) -> None:
        heads = self.heads
        if self.format == "bf16":
            keys = keys.reshape(heads, -1, BLOCK, self.key_dim // 2, 2).transpose(0, 1, 3, 2, 4)
            values = values.reshape(heads, -1, 2, self.value_dim).transpose(0, 1, 3, 2)
        else:
            keys = keys.reshape(heads, -1, BLOCK, self.key_dim).transpose(0, 1, 3, 2)
            values = values.reshape(heads, -1, 4, self.value_dim // BLOCK, BLOCK).transpose(0, 1, 3, 2, 4)
        self._keys[slot], self._values[slot] = keys.reshape(heads, -1), values.reshape(heads, -1)


class SharedPages:
    """Zeroed pages of rows [rank + rope_dim] that are keys of all heads, and their first `rank` dimensions values; and
    of the keys [index_dim] of an indexer behind them, in bf16.
    """

    def __init__(
        self, slots: int, rank: int, rope_dim: int, tokens: int, format: str = "bf16", index_dim: int = 0
    ) -> None:
        self.rank, self.dim, self.format = rank, rank + rope_dim, format
        self.key_dim, self.value_dim = round_up(self.dim, KEY_ALIGN), round_up(rank, BLOCK)
        self.tokens = round_up(tokens, KEY_BLOCK)
        self._size = self.tokens * self.key_dim * DTYPES[format].itemsize
        self._end = self._size + (0 if format == "bf16" else 4 * self.tokens)
        self.index_dim = round_up(index_dim, KEY_ALIGN)
        self._pages = aligned((slots, self._end + self.tokens * self.index_dim * 2), np.uint8)

    @property
    def layout(self) -> cpu_kernels.KvLayout:
        scales = 0 if self.format == "bf16" else self._size
        return cpu_kernels.KvLayout(
            base=self._pages.ctypes.data,
            sequence_stride=self._pages.strides[0],
            head_stride=0,
            value_offset=0,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            format=getattr(cpu_kernels.Format, self.format),
            key_scales_offset=scales,
            value_scales_offset=scales,
            shared=True,
            index_offset=self._end if self.index_dim else 0,
            index_dim=self.index_dim,
        )

    def write(self, slot: int, rows: np.ndarray) -> None:
        """Store rows [n, dim] at positions from 0 on."""
        whole = np.zeros((self.tokens, self.key_dim), DTYPES[self.format])
        whole[: len(rows), : self.dim], scales = quantised(rows, self.format)
        pair = (self.key_dim // 2, 2) if self.format == "bf16" else (self.key_dim, 1)
        lines = whole.reshape(-1, BLOCK, *pair).transpose(0, 2, 1, 3)
        self._pages[slot, : self._size] = np.ascontiguousarray(lines).reshape(-1).view(np.uint8)
        if self.format != "bf16":
            self._pages[slot, self._size : self._end].view(np.float32)[: len(rows)] = scales

    def write_index(self, slot: int, keys: np.ndarray) -> None:
        """Store keys [n, dim] of an indexer at positions from 0 on."""
        whole = np.zeros((self.tokens, self.index_dim), BF16)
        whole[: len(keys), : keys.shape[1]] = keys
        lines = whole.reshape(-1, BLOCK, self.index_dim // 2, 2).transpose(0, 2, 1, 3)
        self._pages[slot, self._end :] = np.ascontiguousarray(lines).reshape(-1).view(np.uint8)

    def index(self, slot: int) -> np.ndarray:
        """The keys of an indexer that are stored, [tokens, index_dim] bf16."""
        lines = self._pages[slot, self._end :].view(BF16).reshape(-1, self.index_dim // 2, BLOCK, 2)
        return lines.transpose(0, 2, 1, 3).reshape(self.tokens, self.index_dim)

    def rows(self, slot: int) -> np.ndarray:
        """What is stored, [tokens, key_dim], as float64."""
        stored = self._pages[slot, : self._size].view(DTYPES[self.format])
        pair = (self.key_dim // 2, 2) if self.format == "bf16" else (self.key_dim, 1)
        found = stored.reshape(-1, pair[0], BLOCK, pair[1]).transpose(0, 2, 1, 3).reshape(self.tokens, self.key_dim)
        if self.format == "bf16":
            return found.astype(np.float64)
        return found.astype(np.float64) * self._pages[slot, self._size : self._end].view(np.float32)[:, None]
