"""Small configurations of every family, with odd sizes, and what families have in common."""

from __future__ import annotations

from typing import Any

from configs import dense, experts, latent, recurrent

CONFIGS: dict[str, dict[str, Any]] = {**dense.CONFIGS, **experts.CONFIGS, **latent.CONFIGS, **recurrent.CONFIGS}

# Families that are others under another name, or text models beside more.
WRAPPERS = (  # models of more than text
    "gemma3",
    "gemma4",
    "glm4v_moe",
    "glm5_next",
    "internvl",
    "kimi_k25",
    "lfm2_vl",
    "minimax_m3_vl",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen4_exp",
    "step3p7",
)
OTHER_NAMES = ("kimi_k2", "ministral", *WRAPPERS)
STACKED = (
    "gpt_oss",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
    "gemma4_text",
    "mistral4",
    "step3p5",
)  # families whose experts are never apart
APART = ("deepseek_v4", "sarvam_moe")  # families whose experts are always apart
# Families with layers that no device computes.
ON_HOST: tuple[str, ...] = (
    "cohere",
    "cohere2",
    "cohere2_moe",
    "gemma2",
    "mimo_v2_flash",
    "afmoe",
    "gemma4_text",
    "deepseek_v32",
    "deepseek_v4",
    "glm5_next_text",
    "glm_moe_dsa",
    "kimi_linear",
    "bailing_hybrid",
    "granitemoehybrid",
    "bamba",
    "flex_olmo",
    "minimax_m3_vl_text",
    "nemotron_h",
    "qwen4_exp_text",
    "step3p5",
)
ON_DEVICE = [family for family in CONFIGS if family not in ON_HOST]  # families all of whose layers a device computes
