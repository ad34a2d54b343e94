"""GLM-5 to 5.2: DeepSeek-V3.2 with other sizes and no groups; some of its layers select what one before them did.

Selecting is not computed, so that no sequence has more than `index_topk` tokens; see `deepseek_v32.py`.
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
    fields = Fields(config)
    return read_indexed(fields, "glm_moe_dsa", DEFAULTS, q_rank=2048, nope_dim=192, value_dim=256, groups=(1, 1))
