"""Qwen3.5 and 3.6: the text model, beside a vision tower that is not used; Gated DeltaNet, gated attention and dense
feed-forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import qwen3_5_text
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"qwen3_5_text": qwen3_5_text.spec, "qwen3_5": qwen3_5_text.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "qwen3_5", FAMILIES)
