"""Keys and values in the layout that the kernels read, for one layer."""

from __future__ import annotations

import numpy as np
from rig import BF16, aligned

import cpu_kernels
from hybrid.program import KEY_BLOCK
from hybrid.weights.layout import BLOCK, K_ALIGN, round_up


class KvPages:
    """Zeroed pages of `slots` sequences of up to `tokens` tokens."""

    def __init__(self, slots: int, heads: int, head_dim: int, tokens: int) -> None:
        self.heads, self.head_dim = heads, head_dim
        self.key_dim, self.value_dim = round_up(head_dim, K_ALIGN), round_up(head_dim, BLOCK)
        self.tokens = round_up(tokens, KEY_BLOCK)
        split = self.tokens * self.key_dim
        self._pages = aligned((slots, heads, split + self.tokens * self.value_dim), BF16)
        self._keys = self._pages[..., :split].reshape(slots, heads, -1, self.key_dim // 2, BLOCK, 2)
        self._values = self._pages[..., split:].reshape(slots, heads, -1, self.value_dim, 2)

    @property
    def layout(self) -> cpu_kernels.KvLayout:
        return cpu_kernels.KvLayout(
            base=self._pages.ctypes.data,
            slot_stride=self._pages.strides[0],
            head_stride=self._pages.strides[1],
            value_offset=self.tokens * self.key_dim * 2,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
        )

    def keys(self, slot: int) -> np.ndarray:
        """A copy [heads, tokens, key_dim]."""
        return self._keys[slot].transpose(0, 1, 3, 2, 4).reshape(self.heads, self.tokens, self.key_dim)

    def values(self, slot: int) -> np.ndarray:
        """A copy [heads, tokens, value_dim]."""
        return self._values[slot].transpose(0, 1, 3, 2).reshape(self.heads, self.tokens, self.value_dim)

    def write(self, slot: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Store keys and values [heads, n, head_dim] at positions from 0 on."""
        count, dim = keys.shape[1:]
        whole = self.keys(slot), self.values(slot)
        for array, part in zip(whole, (keys, values), strict=True):
            array[:, :count, :dim] = part
        self._keys[slot] = whole[0].reshape(self.heads, -1, BLOCK, self.key_dim // 2, 2).transpose(0, 1, 3, 2, 4)
        self._values[slot] = whole[1].reshape(self.heads, -1, 2, self.value_dim).transpose(0, 1, 3, 2)

    def fill(self, slot: int, value: float) -> None:
        self._pages[slot] = value

    def used(self) -> int:
        """How many (slot, position) hold a key or value that is not zero."""
        slots = range(len(self._pages))
        return sum(int((self.keys(s).any((0, 2)) | self.values(s).any((0, 2))).sum()) for s in slots)
