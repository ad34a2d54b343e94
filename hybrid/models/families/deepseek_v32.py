"""DeepSeek-V3.2: DeepSeek-V3, which selects what it attends to in sequences of more than `index_topk` tokens.

Every layer has an indexer that selects; what turns of its queries and keys does so by halves, not pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults
from hybrid.models.deepseek import read_indexed
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec

DEFAULTS = Defaults(max_position=163_840)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_indexed(
        Fields(config), "deepseek_v32", DEFAULTS,
        q_rank=1536, nope_dim=128, value_dim=128, groups=(8, 4), index_heads=64, interleaved=False,
    )  # fmt: skip
