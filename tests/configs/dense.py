"""Families without experts that attend to all keys, or to those of a window."""

from __future__ import annotations

from typing import Any

from configs.common import COMMON, GROWING, YARN

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {**COMMON, "model_type": "qwen2"},
    "qwen3": {**COMMON, "model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {  # bounds that matter
        **{name: value for name, value in COMMON.items() if name != "tie_word_embeddings"},
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 16,
        "sliding_window": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **COMMON,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 20,
        "query_pre_attn_scalar": 40,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 3.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "phi3": {
        **COMMON,
        "model_type": "phi3",
        "head_dim": 16,
        "pad_token_id": None,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.05, 1.15, 1.3, 1.6, 2.0],
            "long_factor": [1.0, 1.5, 2.2, 3.0, 5.0, 8.0],
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {**COMMON, "model_type": "mistral", "sliding_window": 20},
    "smollm3": {**COMMON, "model_type": "smollm3", "pad_token_id": None, "head_dim": 16, "num_hidden_layers": 4},
    "seed_oss": {**COMMON, "model_type": "seed_oss", "attention_bias": True},
    "cohere": {**COMMON, "model_type": "cohere", "head_dim": 16, "layer_norm_eps": 1e-5, "logit_scale": 0.5},
    "cohere2": {
        **COMMON,
        "model_type": "cohere2",
        "layer_norm_eps": 1e-5,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 20,
        "logit_scale": 0.5,
    },
    "glm4": {**COMMON, "model_type": "glm4", "pad_token_id": None, "attention_bias": True},
    "olmo2": {**COMMON, "model_type": "olmo2", "pad_token_id": None, "head_dim": 16},
    "olmo3": {
        **{name: value for name, value in COMMON.items() if name != "rope_theta"},
        "model_type": "olmo3",
        "pad_token_id": None,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {**YARN, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    },
    "exaone4": {**COMMON, "model_type": "exaone4", "num_hidden_layers": 4, "sliding_window": 20},
    "granite": {
        **COMMON,
        "model_type": "granite",
        "head_dim": 16,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
    },
    "ernie4_5": {**COMMON, "model_type": "ernie4_5", "tie_word_embeddings": True},
    "hunyuan_v1_dense": {**COMMON, "model_type": "hunyuan_v1_dense", "tie_word_embeddings": True},
    "glm": {**COMMON, "model_type": "glm", "pad_token_id": None, "attention_bias": True},
    "ministral3": {**COMMON, "model_type": "ministral3", "rope_scaling": GROWING},
}
