"""The words that GGUF files have for architectures, and the families that their models are of."""

from __future__ import annotations

INDEXED_TYPES = {"deepseek32": "deepseek_v32", "glm-dsa": "glm_moe_dsa"}  # whose attention selects tokens
SELECTING = (*INDEXED_TYPES.values(), "glm5_next_text")  # families without indexers where contexts are short
GLM5_NEXT = ("glm5next", "glm5-next")  # that of the first files of GLM-5.3-Flash, and that of llama.cpp
KIMI_DELTA = ("kimi-linear", "bailingmoe3", *GLM5_NEXT)  # with Kimi Delta Attention
LATENT = ("deepseek2", "mistral4", *INDEXED_TYPES, *KIMI_DELTA)
GROWING = ("mistral3", "mistral4", "deepseek2")  # in which late queries may be larger
COHERE = ("command-r", "cohere2")  # with LayerNorms
NEMOTRON = ("nemotron_h", "nemotron_h_moe")  # whose layers are of one half each
MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "mixtral"),
    "qwen2vl": ("qwen2",),
    "qwen3vl": ("qwen3",),
    "qwen3vlmoe": ("qwen3_moe",),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "qwen2moe": ("qwen2_moe",),
    "qwen3moe": ("qwen3_moe",),
    "gpt-oss": ("gpt_oss",),
    "glm4moe": ("glm4_moe",),
    "minimax-m2": ("minimax_m2",),
    "minimax-m3": ("minimax_m3_vl_text",),
    "ernie4_5-moe": ("ernie4_5_moe",),
    "hunyuan-moe": ("hunyuan_v1_moe",),
    "hy_v3": ("hy_v3",),
    "olmoe": ("olmoe",),
    "granitemoe": ("granitemoe", "granitemoeshared"),
    "deepseek2": ("deepseek_v2", "deepseek_v3", "mistral4"),
    "mistral3": ("ministral3",),
    "mistral4": ("mistral4",),
    "deepseek32": ("deepseek_v32",),
    "deepseek4": ("deepseek_v4",),
    "glm-dsa": ("glm_moe_dsa",),
    **dict.fromkeys(GLM5_NEXT, ("glm5_next_text",)),
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "phi3": ("phi3",),
    "phimoe": ("phimoe",),
    "lfm2": ("lfm2",),
    "lfm2moe": ("lfm2_moe",),
    "qwen3next": ("qwen3_next",),
    "qwen35": ("qwen3_5_text",),
    "qwen35moe": ("qwen3_5_moe_text",),
    "kimi-linear": ("kimi_linear",),
    "bailingmoe3": ("bailing_hybrid",),
    "bailingmoe2": ("sarvam_moe",),
    "smollm3": ("smollm3",),
    "seed_oss": ("seed_oss",),
    "dots1": ("dots1",),
    "glm4": ("glm4",),
    "olmo2": ("olmo2", "olmo3"),
    "exaone4": ("exaone4",),
    "exaone-moe": ("exaone_moe",),
    "granite": ("granite",),
    "granitehybrid": ("granitemoehybrid",),
    "nemotron_h": ("nemotron_h",),
    "nemotron_h_moe": ("nemotron_h",),
    "ernie4_5": ("ernie4_5",),
    "hunyuan-dense": ("hunyuan_v1_dense",),
    "chatglm": ("glm",),
    "afmoe": ("afmoe",),
    "laguna": ("laguna",),
    "mellum": ("mellum",),
    "gemma2": ("gemma2",),
    "command-r": ("cohere",),
    "cohere2": ("cohere2",),
    "mimo2": ("mimo_v2_flash",),
    "step35": ("step3p5",),
}
