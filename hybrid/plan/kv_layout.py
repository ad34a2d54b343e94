"""Where the state of every sequence lies: keys and values of all layers, and whatever else mixers keep."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import cpu_kernels
from hybrid.formats.block import round_up
from hybrid.models.layers.base import StateLayout
from hybrid.models.spec import ModelSpec
from hybrid.plan.binding import choose


@dataclass(frozen=True)
class KvPlan:
    """[sequence][layer], each layer as its mixer lays it out for `tokens` tokens. format: of keys and values.

    offsets: bytes from the start of a sequence to each layer. sequence_stride: bytes of a sequence.
    """

    format: str
    tokens: int
    layers: tuple[StateLayout, ...]
    offsets: tuple[int, ...]
    sequence_stride: int

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes over all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that a sequence takes before its first token."""
        return self.sequence_stride - self.tokens * self.token_bytes

    @property
    def repeatable(self) -> bool:
        """Whether a step that failed may be run again: whether it then writes what it would have written."""
        return self.run is None

    @property
    def run(self) -> int | None:
        """The tokens of a run, within which alone a sequence can go back (`StateLayout`); None: anywhere."""
        return min((layer.run for layer in self.layers if layer.run), default=None)

    def bound(self, layer: int, base: int = 0, offset: int = 0) -> Any:
        """Where the kernels find the state of a layer, of the class of `cpu_kernels` that its mixer names.

        base: address of the first sequence. offset: bytes into the state.
        """
        state = self.layers[layer]
        binding = getattr(cpu_kernels, state.binding)
        fields = {name: choose(value) for name, value in state.fields.items()}
        start = base + self.offsets[layer] + offset
        return binding(base=start, sequence_stride=self.sequence_stride, **fields)


def lay_out_kv(spec: ModelSpec, length: int, format: str) -> KvPlan:
    """For sequences of up to `length` tokens."""
    tokens = round_up(length, cpu_kernels.KEY_BLOCK)
    layers = tuple(layer.mixer.state(tokens, format) for layer in spec.layers)
    *offsets, total = accumulate((layer.nbytes for layer in layers), initial=0)
    return KvPlan(format, tokens, layers, tuple(offsets), total)
