"""What families with Kimi Delta Attention share, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cpu_kernels
from hybrid.models.layers.kimi_delta import KimiDeltaAttention, KimiDeltaNames
from hybrid.models.reading import Fields

LINEAR = "linear_attention"  # word of `layer_types`


def with_words(config: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    """The configuration with fields by other words, unless it has them by these too."""
    renamed = {new: config[old] for old, new in words.items() if old in config and new not in config}
    return {name: value for name, value in config.items() if name not in words} | renamed


def read_kimi_delta(
    fields: Fields, heads: int, dim: str, taps: str, names: KimiDeltaNames | None = None
) -> KimiDeltaAttention:
    """The mixer without latents or bounds, a rate of decay for each head. dim, taps: names of both fields."""
    return KimiDeltaAttention(
        heads,
        fields.size(dim, default=128, maximum=cpu_kernels.MAX_DELTA_DIM),
        fields.size(taps, default=4, minimum=2, maximum=8),
        0,
        0.0,
        (heads,),
        names or KimiDeltaNames(),
    )
