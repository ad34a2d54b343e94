"""Step-3.7-Flash: the text model, which is Step-3.5-Flash, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import step3p5
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "step3p7", {"step3p5": step3p5.spec})
