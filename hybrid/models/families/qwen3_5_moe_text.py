"""Qwen3.5 and 3.6 with experts, the text alone: a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.qwen_next import read_qwen3_5
from hybrid.models.reading import Fields
from hybrid.models.spec import ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_qwen3_5(Fields(config), "qwen3_5_moe_text", dense=False)
