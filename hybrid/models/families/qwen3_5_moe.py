"""Qwen3.5 and 3.6 with experts: the text model, beside a vision tower that is not used; Gated DeltaNet, gated attention
and a gated shared expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.qwen_next import read_text_part
from hybrid.models.spec import ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "qwen3_5_moe", dense=False)
