"""What goes into a packed store: the content of each of its tensors, streamed out of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.errors import WeightsError
from hybrid.weights.checkpoint import Checkpoint, Rows, bias_name
from hybrid.weights.layout import BLOCK, StoreTensor, all_finite, pack_gate_up, pack_matrix

CHUNK_BYTES = 1 << 20  # of a matrix read at a time: what stays in the cache packs three times as fast

# The checkpoint tensors of a store tensor, as fields of TensorNames; stacked when there are several.
_SOURCES = {
    "embedding": ("embedding",),
    "final_norm": ("final_norm",),
    "head": ("head",),
    "attention.norm": ("attention_norm",),
    "attention.qkv": ("q", "k", "v"),
    "attention.qkv_bias": ("q", "k", "v"),
    "attention.q_norm": ("q_norm",),
    "attention.k_norm": ("k_norm",),
    "attention.out": ("out",),
    "attention.out_bias": ("out",),
    "ffn.norm": ("feed_forward_norm",),
    "ffn.router": ("router",),
}


class Content:
    """Packed tensors of one checkpoint. `check`: raise `WeightsError` on a tensor that is not finite."""

    def __init__(self, checkpoint: Checkpoint, check: bool = False) -> None:
        self._checkpoint = checkpoint
        self._check = check

    def chunks(self, tensor: StoreTensor) -> Iterator[npt.NDArray[Any]]:
        """The stored array in order, in pieces of some MB: together `tensor.nbytes`."""
        layer, role = _split(tensor.name)
        if role == "ffn.experts":
            return self._experts(layer)
        names = [getattr(self._checkpoint.spec.names, field).format(layer=layer) for field in _SOURCES[role]]
        if tensor.dtype == "F32":
            return self._floats([bias_name(n) for n in names] if role.endswith("_bias") else names, tensor)
        return self._matrix([self._checkpoint.matrix(name) for name in names])

    def _floats(self, names: Sequence[str], tensor: StoreTensor) -> Iterator[npt.NDArray[np.float32]]:
        parts = [self._checked(name, self._checkpoint.read(name)).reshape(-1) for name in names]
        values = np.concatenate(parts).astype(np.float32)
        yield np.pad(values, (0, tensor.nbytes // 4 - values.size))

    def _experts(self, layer: int) -> Iterator[npt.NDArray[np.uint16]]:
        """One expert after the other: gate and up interleaved, then down."""
        for expert in range(max(1, self._checkpoint.spec.layers[layer].feed_forward.experts)):
            gate, up, down = self._checkpoint.feed_forward(layer, expert)
            for start, stop in self._steps([gate]):
                yield pack_gate_up(self._rows([gate], start, stop), self._rows([up], start, stop))
            yield from self._matrix([down])

    def _matrix(self, parts: Sequence[Rows]) -> Iterator[npt.NDArray[np.uint16]]:
        for start, stop in self._steps(parts):
            yield pack_matrix(self._rows(parts, start, stop))

    def _steps(self, parts: Sequence[Rows]) -> Iterator[tuple[int, int]]:
        """Ranges of whole blocks of rows that cover the stacked parts."""
        row_bytes = 4 * self._checkpoint.shape(parts[0].name)[-1]
        step = max(BLOCK, CHUNK_BYTES // row_bytes // BLOCK * BLOCK)
        total = sum(part.count for part in parts)
        return ((start, min(start + step, total)) for start in range(0, total, step))

    def _rows(self, parts: Sequence[Rows], start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start` to `stop` of the parts seen as one matrix."""
        pieces = []
        for part in parts:
            first, last = max(start, 0), min(stop, part.count)
            if first < last:
                rows = self._checkpoint.read_rows(part.name, part.start + first, part.start + last)
                pieces.append(self._checked(part.name, rows))
            start, stop = start - part.count, stop - part.count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _checked(self, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self._check and not all_finite(values):
            raise WeightsError(
                f"{self._checkpoint.path}: tensor {name} holds NaN or infinity, weights must be finite: "
                "take another checkpoint"
            )
        return values


def _split(name: str) -> tuple[int, str]:
    """Layer and role of a store tensor; layer 0 stands for none."""
    if not name.startswith("layers."):
        return 0, name
    _, layer, role = name.split(".", 2)
    return int(layer), role
