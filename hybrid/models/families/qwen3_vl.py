"""Qwen3-VL: the text model, which is Qwen3 without images, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import qwen3
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"qwen3_vl_text": qwen3.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "qwen3_vl", FAMILIES)
