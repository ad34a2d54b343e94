"""Qwen2-VL: the text model, which is Qwen2 without images, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families.qwen2_5_vl import read_whole
from hybrid.models.spec import ModelSpec


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_whole(config, "qwen2_vl")
