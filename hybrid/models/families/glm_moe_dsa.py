"""GLM-5 to 5.2: DeepSeek-V3.2 with other sizes and no groups; some of its layers select what one before them did.

What turns of an indexer's queries and keys does so pair by pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.decoder import Defaults
from hybrid.models.deepseek import read_indexed
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec

DEFAULTS = Defaults(max_position=202_752, eps=1e-5)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_indexed(
        Fields(config), "glm_moe_dsa", DEFAULTS,
        q_rank=2048, nope_dim=192, value_dim=256, groups=(1, 1), index_heads=32, interleaved=True, shares=True,
    )  # fmt: skip
