"""Sarvam 105B: DeepSeek-V3 with one dense layer, no groups of experts and no latents of queries.

Layers for the prediction of further tokens, which a checkpoint has behind its last one, are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.models.deepseek import read_deepseek_v3
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import ModelSpec

WORDS = {"num_shared_experts": "n_shared_experts", "score_function": "scoring_func"}
DEFAULTS = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
YARN = "deepseek_yarn"  # what the published configuration calls yarn


def spec(config: Mapping[str, Any]) -> ModelSpec:
    said = {name: value for name, value in with_words(config, WORDS).items() if value is not None}
    rope = said.get("rope_scaling")
    if isinstance(rope, Mapping) and YARN in (rope.get("type"), rope.get("rope_type")):
        said["rope_scaling"] = {**{name: item for name, item in rope.items() if name != "type"}, "rope_type": "yarn"}
    return read_deepseek_v3(Fields({**DEFAULTS, **said}), "sarvam_mla")
