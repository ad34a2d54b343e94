"""DeepSeek-V3.2: DeepSeek-V3, which selects what it attends to in sequences of more than `index_topk` tokens.

Selecting is not computed, so that no sequence is longer; the tensors of the indexers that would do it are not read, as
those of layers that predict further tokens.
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
    fields = Fields(config)
    return read_indexed(fields, "deepseek_v32", DEFAULTS, q_rank=1536, nope_dim=128, value_dim=128, groups=(8, 4))
