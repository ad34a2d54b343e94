"""InternVL 3 and 3.5: the text model, of one of several families, beside a vision tower that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.families import gpt_oss, llama, qwen2, qwen3, qwen3_moe
from hybrid.models.spec import ModelSpec
from hybrid.models.text_part import read_text_part

FAMILIES = {
    "qwen2": qwen2.spec,
    "qwen3": qwen3.spec,
    "qwen3_moe": qwen3_moe.spec,
    "gpt_oss": gpt_oss.spec,
    "llama": llama.spec,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    return read_text_part(config, "internvl", FAMILIES, tied=True)
