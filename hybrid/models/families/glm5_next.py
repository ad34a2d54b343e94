"""GLM-5.3-Flash: the text model, beside a vision tower that is not used.

Configurations of checkpoints of text alone describe it without a `text_config` around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import glm5_next_text
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

NAMES = ("glm5_next_text", "glm5_next")  # what configurations may call the text model


def spec(config: Mapping[str, Any]) -> ModelSpec:
    whole = {**config, "text_config": config} if config.get("text_config") is None else config
    return read_text_part(whole, "glm5_next", dict.fromkeys(NAMES, glm5_next_text.spec))
