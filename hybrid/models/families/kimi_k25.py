"""Kimi K2.5: the text model, which is Kimi K2, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import deepseek_v3, kimi_k2
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"deepseek_v3": deepseek_v3.spec, "kimi_k2": kimi_k2.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "kimi_k25", FAMILIES, tied=True)
