"""What families with Kimi Delta Attention share, read from config.json."""

from __future__ import annotations

import cpu_kernels
from hybrid.errors import ConfigError
from hybrid.models.layers.kimi_delta import KimiDeltaAttention, KimiDeltaNames
from hybrid.models.reading import Fields

LINEAR = "linear_attention"  # word of `layer_types`
_LOWEST = -80.0  # of the logarithm of a decay: those below are no normal numbers


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


def read_lower_bound(fields: Fields, name: str) -> float:
    """Of the logarithm of a decay; name: of its field."""
    bound = fields.number(name, default=-5.0, above=_LOWEST)
    if bound >= 0:
        raise ConfigError(f"config.json: {name} is {bound:g}; it must be below 0 and above {_LOWEST:g}: correct it")
    return bound
