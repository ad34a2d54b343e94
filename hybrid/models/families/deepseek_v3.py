"""DeepSeek-V3, R1 and V3.1: latent attention, a sigmoid router with groups, a shared expert, first layers dense.

Layers for the prediction of further tokens, which a checkpoint has behind its last one, are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.deepseek import read_deepseek_v3
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_deepseek_v3(Fields(config), "deepseek_v3")
