"""Kimi K2: DeepSeek-V3 with more experts, no groups and fewer heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.deepseek import read_deepseek_v3
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_deepseek_v3(Fields(config), "kimi_k2")
