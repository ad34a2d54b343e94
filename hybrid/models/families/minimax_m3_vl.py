"""MiniMax-M3: the text model, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import minimax_m3_vl_text
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

NAMES = ("minimax_m3_vl_text", "minimax_m3", "minimax_m2")  # what published configurations may call the text model


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "minimax_m3_vl", dict.fromkeys(NAMES, minimax_m3_vl_text.spec))
