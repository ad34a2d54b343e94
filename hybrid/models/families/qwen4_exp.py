"""Qwen3.8-Flash-Next: the text model, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import qwen4_exp_text
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"qwen4_exp_text": qwen4_exp_text.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "qwen4_exp", FAMILIES)
