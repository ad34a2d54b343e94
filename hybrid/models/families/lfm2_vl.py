"""LFM2-VL: the text model, which is LFM2, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import lfm2
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {"lfm2": lfm2.spec}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "lfm2_vl", FAMILIES, tied=True)
