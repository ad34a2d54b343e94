"""The weights of a step that are not experts, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybrid.formats.mix import FormatMix
from hybrid.gpu.layers.base import kind_of
from hybrid.gpu.loader import Loader, Read
from hybrid.gpu.parts import NormWeights
from hybrid.models.spec import ModelSpec
from hybrid.models.tensors import StoreTensor


@dataclass(frozen=True)
class DeviceWeights:
    """head: the embedding itself where both are one. mixers, feed_forwards: of each layer, as its kind loads them."""

    embedding: Tensor
    final_norm: NormWeights
    head: Tensor
    head_bias: Tensor | None
    mixers: tuple[Any, ...]
    feed_forwards: tuple[Any, ...]


def load_weights(
    spec: ModelSpec, mix: FormatMix, tensors: Mapping[str, StoreTensor], read: Read, device: torch.device
) -> DeviceWeights:
    """tensors: those of the store. Raises torch's out-of-memory error where the device has no room for them."""
    load = Loader(spec.hidden, tensors, read, device)
    embedding = load.matrix("embedding", spec.vocab, spec.hidden)
    halves = [kind_of(half).load(half, place, load) for place, half in spec.halves(mix)]
    return DeviceWeights(
        embedding,
        load.norm("final_norm"),
        load.matrix("head", spec.vocab, spec.hidden) if "head" in tensors else embedding,
        load.some_floats(f"{spec.head_weight(mix)}_bias", spec.vocab),
        tuple(halves[::2]),
        tuple(halves[1::2]),
    )
