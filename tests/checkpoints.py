"""Small random checkpoints of every family, with odd sizes: written with numpy alone, or by transformers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hybrid.formats.mix import parse_mix
from hybrid.models import model_spec
from hybrid.models.spec import ModelSpec
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.matrices import Source
from hybrid.weights.pack import pack
from hybrid.weights.store import Store

_COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 72,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
_YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_GROWING: dict[str, Any] = {  # late queries are larger
    **_YARN,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
_LATENT: dict[str, Any] = {  # latent attention of odd sizes
    **{name: value for name, value in _COMMON.items() if name != "head_dim"},
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "kv_lora_rank": 52,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 28,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_DELTA: dict[str, Any] = {  # gated delta rule of odd sizes
    **_COMMON,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 20,
    "linear_value_head_dim": 28,
}
_DELTA_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
_KIMI_DELTA: dict[str, Any] = {  # Kimi Delta Attention of odd sizes, beside latent attention
    **{name: value for name, value in _LATENT.items() if name != "rope_theta"},
    "num_hidden_layers": 4,
    "pad_token_id": None,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {**_COMMON, "model_type": "qwen2"},
    "qwen3": {**_COMMON, "model_type": "qwen3", "tie_word_embeddings": True},
    "mixtral": {**_COMMON, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_COMMON,
        "model_type": "qwen3_moe",
        "num_experts": 10,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        **_COMMON,
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "lfm2": {
        **_COMMON,
        "model_type": "lfm2",
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "conv_L_cache": 4,
        "conv_bias": True,
        "norm_eps": 1e-6,
        "block_multiple_of": 8,
    },
    "gpt_oss": {
        **_COMMON,
        "model_type": "gpt_oss",
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 20,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "olmoe": {
        **_COMMON,
        "model_type": "olmoe",
        "num_key_value_heads": 6,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "glm4_moe": {
        **_COMMON,
        "model_type": "glm4_moe",
        "num_hidden_layers": 3,
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "sarvam_moe": {
        **_COMMON,
        "model_type": "sarvam_moe",
        "num_hidden_layers": 3,
        "moe_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    "mimo_v2_flash": {  # values narrower than keys, and of odd sizes
        **{name: value for name, value in _COMMON.items() if name not in ("rope_theta", "num_key_value_heads")},
        "model_type": "mimo_v2_flash",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "v_head_dim": 20,
        "sliding_window": 21,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "attention_value_scale": 0.6,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.334},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.334},
        },
    },
    "minimax_m2": {
        **_COMMON,
        "model_type": "minimax_m2",
        "rotary_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    },
    "ernie4_5_moe": {
        **_COMMON,
        "model_type": "ernie4_5_moe",
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "moe_intermediate_size": 40,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {
        **_COMMON,
        "model_type": "hunyuan_v1_moe",
        "num_experts": 6,
        "moe_topk": 3,
    },
    "deepseek_v2": {
        **_LATENT,
        "model_type": "deepseek_v2",
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    },
    "sarvam_mla": {
        **_LATENT,
        "model_type": "sarvam_mla",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek_v3": {
        **_LATENT,
        "model_type": "deepseek_v3",
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "q_lora_rank": 36,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "glm4_moe_lite": {
        **_LATENT,
        "model_type": "glm4_moe_lite",
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "q_lora_rank": 36,
        "kv_lora_rank": 40,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
    },
    "deepseek_v32": {
        **_LATENT,
        "model_type": "deepseek_v32",
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "q_lora_rank": 36,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "index_n_heads": 3,
        "index_head_dim": 20,
        "index_topk": 200,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "glm_moe_dsa": {
        **_LATENT,
        "model_type": "glm_moe_dsa",
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "q_lora_rank": 36,
        "kv_lora_rank": 40,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "index_n_heads": 3,
        "index_head_dim": 20,
        "index_topk": 200,
        "index_topk_pattern": "FSF",
    },
    "gemma2": {  # bounds that matter
        **{name: value for name, value in _COMMON.items() if name != "tie_word_embeddings"},
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 16,
        "sliding_window": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_COMMON,
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
    "gemma4_text": {
        **{name: value for name, value in _COMMON.items() if name != "rope_theta"},
        "model_type": "gemma4_text",
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 20,
        "global_head_dim": 40,
        "num_global_key_value_heads": 3,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 56,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "phimoe": {
        **_COMMON,
        "model_type": "phimoe",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0],
            "long_factor": [1.0, 1.2, 1.5, 1.8, 2.2, 2.6, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0],
            "short_mscale": 1.1,
            "long_mscale": 1.2431,
            "original_max_position_embeddings": 64,
        },
    },
    "phi3": {
        **_COMMON,
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
    "granitemoe": {
        **_COMMON,
        "model_type": "granitemoe",
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
    },
    "granitemoeshared": {
        **_COMMON,
        "model_type": "granitemoeshared",
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 56,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.0625,
    },
    "granitemoehybrid": {  # state spaces of odd sizes
        **_COMMON,
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 56,
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 20,
        "mamba_d_head": 24,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.0625,
    },
    "bamba": {  # state spaces of odd sizes
        **_COMMON,
        "model_type": "bamba",
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "head_dim": 16,
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 20,
        "mamba_d_head": 24,
    },
    "nemotron_h": {  # layers of one half each
        **{name: value for name, value in _COMMON.items() if name not in ("rope_theta", "rms_norm_eps")},
        "model_type": "nemotron_h",
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "moe", "attention", "mamba", "mlp"],
        "layer_norm_epsilon": 1e-6,
        "mamba_num_heads": 6,
        "mamba_head_dim": 28,
        "n_groups": 2,
        "ssm_state_size": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56,
        "routed_scaling_factor": 2.5,
        "n_group": 2,
        "topk_group": 1,
    },
    "qwen3_next": {**_DELTA, **_DELTA_EXPERTS, "model_type": "qwen3_next", "mlp_only_layers": [1]},
    "qwen3_5_moe_text": {
        **_DELTA,
        **_DELTA_EXPERTS,
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_conv_kernel_dim": 3,
        "attention_bias": True,
    },
    "qwen3_5_text": {**_DELTA, "model_type": "qwen3_5_text", "tie_word_embeddings": True},
    "qwen4_exp_text": {  # two tables of n-grams, whose pieces are not of one size
        **_DELTA,
        **_DELTA_EXPERTS,
        "model_type": "qwen4_exp_text",
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        "partial_rotary_factor": 0.5,
        "output_gate_type": "sigmoid",
        "hc_count": 3,
        "hc_lowrank": 20,
        "indexer_n_heads": 3,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 20,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1, 4],
        "ple_embed_dim": 44,
        "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 3,
        "eos_token_id": 5,
    },
    "mistral": {**_COMMON, "model_type": "mistral", "sliding_window": 20},
    "smollm3": {**_COMMON, "model_type": "smollm3", "pad_token_id": None, "head_dim": 16, "num_hidden_layers": 4},
    "seed_oss": {**_COMMON, "model_type": "seed_oss", "attention_bias": True},
    "cohere": {**_COMMON, "model_type": "cohere", "head_dim": 16, "layer_norm_eps": 1e-5, "logit_scale": 0.5},
    "cohere2": {
        **_COMMON,
        "model_type": "cohere2",
        "layer_norm_eps": 1e-5,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 20,
        "logit_scale": 0.5,
    },
    "cohere2_moe": {
        **{name: value for name, value in _COMMON.items() if name != "rms_norm_eps"},
        "model_type": "cohere2_moe",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "prefix_dense_intermediate_size": 88,
        "sliding_window_pattern": 2,
        "sliding_window": 20,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "logit_scale": 0.5,
    },
    "dots1": {
        **_COMMON,
        "model_type": "dots1",
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
    },
    "glm4": {**_COMMON, "model_type": "glm4", "pad_token_id": None, "attention_bias": True},
    "olmo2": {**_COMMON, "model_type": "olmo2", "pad_token_id": None, "head_dim": 16},
    "flex_olmo": {
        **_COMMON,
        "model_type": "flex_olmo",
        "pad_token_id": None,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "olmo3": {
        **{name: value for name, value in _COMMON.items() if name != "rope_theta"},
        "model_type": "olmo3",
        "pad_token_id": None,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {**_YARN, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    },
    "olmo_hybrid": {
        **_DELTA,
        "model_type": "olmo_hybrid",
        "pad_token_id": None,
        "head_dim": 16,
        "rope_theta": None,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "exaone4": {**_COMMON, "model_type": "exaone4", "num_hidden_layers": 4, "sliding_window": 20},
    "lfm2_moe": {
        **_COMMON,
        "model_type": "lfm2_moe",
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "conv_L_cache": 3,
        "norm_eps": 1e-6,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "num_dense_layers": 1,
        "routed_scaling_factor": 1.5,
        "tie_word_embeddings": True,
    },
    "exaone_moe": {
        **_COMMON,
        "model_type": "exaone_moe",
        "num_hidden_layers": 4,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "moe_intermediate_size": 40,
    },
    "solar_open": {
        **_COMMON,
        "model_type": "solar_open",
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "moe_intermediate_size": 40,
        "attention_bias": True,
    },
    "hy_v3": {
        **_COMMON,
        "model_type": "hy_v3",
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "moe_intermediate_size": 40,
    },
    "mellum": {
        **{name: value for name, value in _COMMON.items() if name != "rope_theta"},
        "model_type": "mellum",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "num_hidden_layers": 3,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["sparse", "sparse", "dense"],
        "rope_parameters": {
            "full_attention": {**_YARN, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "minimax_m3_vl_text": {
        **_COMMON,
        "model_type": "minimax_m3_vl_text",
        "num_hidden_layers": 3,
        "rotary_dim": 12,
        "partial_rotary_factor": 0.5,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "dense_intermediate_size": 88,
        "shared_intermediate_size": 56,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 20,
        "index_topk_blocks": 1,
    },
    "laguna": {
        **{name: value for name, value in _COMMON.items() if name != "rope_theta"},
        "model_type": "laguna",
        "num_hidden_layers": 3,
        "num_attention_heads_per_layer": [6, 4, 8],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 20,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56,
        "moe_routed_scaling_factor": 1.5,
        "rope_parameters": {
            "full_attention": {**_YARN, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    },
    "afmoe": {
        **_COMMON,
        "model_type": "afmoe",
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "sliding_window": 20,
        "global_attn_every_n_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
        "moe_intermediate_size": 40,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
    "granite": {
        **_COMMON,
        "model_type": "granite",
        "head_dim": 16,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
    },
    "ernie4_5": {**_COMMON, "model_type": "ernie4_5", "tie_word_embeddings": True},
    "hunyuan_v1_dense": {**_COMMON, "model_type": "hunyuan_v1_dense", "tie_word_embeddings": True},
    "glm": {**_COMMON, "model_type": "glm", "pad_token_id": None, "attention_bias": True},
    "ministral3": {**_COMMON, "model_type": "ministral3", "rope_scaling": _GROWING},
    "mistral4": {
        **_LATENT,
        "model_type": "mistral4",
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "q_lora_rank": 36,
        "routed_scaling_factor": 1.5,
        "rope_scaling": _GROWING,
    },
    "kimi_linear": {
        **{name: value for name, value in _KIMI_DELTA.items() if name != "layer_types"},
        "model_type": "kimi_linear",
        "linear_attn_config": {
            "full_attn_layers": [2],
            "kda_layers": [1, 3, 4],
            "head_dim": 20,
            "num_heads": 3,
            "short_conv_kernel_size": 4,
        },
        "routed_scaling_factor": 1.5,
        "moe_renormalize": True,
    },
    "bailing_hybrid": {
        **_KIMI_DELTA,
        "model_type": "bailing_hybrid",
        "head_dim": 20,
        "short_conv_kernel_size": 3,
        "rope_theta": 5e4,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
    },
    "glm5_next_text": {  # latents that fill whole lines, so that a row has none left where nothing turns
        **{name: value for name, value in _KIMI_DELTA.items() if name != "num_experts"},
        "model_type": "glm5_next_text",
        "q_lora_rank": 36,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 0,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "linear_head_dim": 20,
        "linear_num_heads": 3,
        "linear_conv_kernel_dim": 4,
        "index_n_heads": 3,
        "index_head_dim": 20,
        "index_topk": 200,
        "index_kpool": 4,
        "hc_mult": 3,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v4": {  # of every kind of layer one, and entries of 16 tokens in place of 128
        "model_type": "deepseek_v4",
        "vocab_size": 131,
        "hidden_size": 96,
        "moe_intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "q_lora_rank": 36,
        "partial_rotary_factor": 0.1875,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "sliding_window": 20,
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_n_heads": 3,
        "index_head_dim": 24,
        "index_topk": 7,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.1875},
            "compress": {**_YARN, "rope_theta": 160000.0, "partial_rotary_factor": 0.1875, "attention_factor": 1.0},
        },
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    },
}
# Families that are others under another name, or text models beside more.
WRAPPERS = (  # models of more than text
    *(
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
    ),
)
OTHER_NAMES = ("kimi_k2", "ministral", *WRAPPERS)
STACKED = (
    "gpt_oss",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
    "gemma4_text",
    "mistral4",
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
)
ON_DEVICE = [family for family in CONFIGS if family not in ON_HOST]  # families all of whose layers a device computes
STREAM_SCALES = ("hc_attn_scale", "hc_ffn_scale", "hc_scale")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


def auto_model(family: str) -> Any:
    """The class of transformers that makes its models: mistral4 is listed among models of images and text alone."""
    import transformers

    if family == "minimax_m3_vl_text":
        read_as_published()
    if family == "glm5_next_text":
        return glm5_next_text()
    return transformers.AutoModelForImageTextToText if family == "mistral4" else transformers.AutoModelForCausalLM


@functools.cache
def glm5_next_text() -> Any:
    """GLM-5.3-Flash's text model with a head, of which transformers has the whole alone."""
    import torch
    import transformers
    from transformers.models.glm5_next import modeling_glm5_next as glm
    from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig

    class Glm5NextTextForCausalLM(glm.Glm5NextPreTrainedModel):  # type: ignore[misc,name-defined]
        config_class = Glm5NextTextConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = glm.Glm5NextTextModel(config)
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: Any, **others: Any) -> Any:
            hidden = self.model(input_ids, **others).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden))

        @classmethod
        def from_config(cls, config: Any) -> Any:
            return cls._from_config(config)

    return Glm5NextTextForCausalLM


def read_as_published() -> None:
    """Have transformers read MiniMax-M3's text alone with the names that it knows of the whole."""
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    of_whole = get_checkpoint_conversion_mapping("minimax_m3_vl")
    register_checkpoint_conversion_mapping("minimax_m3_vl_text", of_whole, overwrite=True)


def random_tensors(
    config: dict[str, Any], dtype: str = "bf16", fused: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name: matrices of spread 0.1, norms around 1."""
    random = np.random.default_rng(seed)
    stacked = (fused and config["model_type"] not in APART) or config["model_type"] in STACKED
    return {
        name: table_of_experts(random, shape, config["n_routed_experts"])
        if name.endswith("tid2eid")
        else _random(random, name, shape).astype(DTYPES[dtype])
        for name, shape in model_spec(config).checkpoint_shapes("fused" if stacked else "apart")
    }


def mxfp4_tensors(spec: ModelSpec, exponents: tuple[int, int] = (110, 125), seed: int = 2) -> dict[str, np.ndarray]:
    """The same as published in mxfp4: experts of random codes, and of exponents from the first up to the second."""
    random, found = np.random.default_rng(seed), {}
    for name, shape in spec.checkpoint_shapes("mxfp4"):
        if name.endswith("_blocks"):
            found[name] = random.integers(0, 256, shape, np.uint8)
        elif name.endswith("_scales"):
            found[name] = random.integers(*exponents, shape, np.uint8)
        else:
            found[name] = _random(random, name, shape).astype(ml_dtypes.bfloat16)
    return found


def mxfp4_values(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Experts of `mxfp4_tensors` as float32 [experts, outputs, inputs]."""
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype("f4") * 2.0 ** (scales[..., None].astype("f4") - 127)
    return values.reshape(*scales.shape[:2], -1)


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return is_around_one(name) + 0.1 * random.standard_normal(shape)


def is_around_one(name: str) -> bool:
    """Whether a tensor multiplies: norms and the scales of Gemma 4."""
    return "norm" in name or name.endswith(("layer_scalar", "router.scale", "per_expert_scale", *STREAM_SCALES))


def table_of_experts(random: np.random.Generator, shape: tuple[int, ...], experts: int) -> np.ndarray:
    """Of every token some different experts, int64 [vocab, top_k]."""
    return random.permuted(np.tile(np.arange(experts), (shape[0], 1)), axis=1)[:, : shape[1]].copy()


def write_tensors(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """A checkpoint directory of these tensors, in one file or in several under an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for index, names in enumerate(np.array_split(sorted(tensors), shards), start=1):
        file = f"model-{index:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[name] for name in names}, path / file)
        weight_map.update({str(name): file for name in names})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def as_fp8(tensors: dict[str, np.ndarray], scales: str = "f4", keep: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The same tensors with random e4m3 codes and scales in place of every projection, as checkpoints publish them."""
    random, found = np.random.default_rng(5), dict(tensors)
    for name in tensors:
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not any(word in name for word in keep):
            shape = tensors[name].shape
            codes = random.integers(0, 127, shape, np.uint8) | random.choice([0, 128], shape).astype(np.uint8)
            found[name] = codes.view(ml_dtypes.float8_e4m3fn)
            squares = [-(-size // 128) for size in shape]
            found[f"{name}_scale_inv"] = random.uniform(1e-4, 1e-3, squares).astype(DTYPES.get(scales, scales))
    return found


def dequantised(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A tensor of `as_fp8` as float32."""
    values = tensors[name].astype(np.float32)
    if f"{name}_scale_inv" not in tensors:
        return values
    squares = tensors[f"{name}_scale_inv"].astype(np.float32).repeat(128, 0).repeat(128, 1)
    return values * squares[: values.shape[0], : values.shape[1]]


def write_checkpoint(
    path: Path, family: str, *, dtype: str = "bf16", fused: bool = False, shards: int = 1, **changes: Any
) -> Path:
    """A random checkpoint of a family, its config changed by the keywords. Needs no torch."""
    config = {**CONFIGS[family], **changes}
    return write_tensors(path, config, random_tensors(config, dtype, fused), shards)


def save_with_transformers(
    path: Path, family: str, *, dtype: str = "fp32", max_shard_size: str = "1GB", fused: bool = False, **changes: Any
) -> Any:
    """Write a random checkpoint with `save_pretrained`; returns the transformers model, in that dtype."""
    import torch
    from transformers import AutoConfig

    config = {**CONFIGS[family], **changes}
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    torch.manual_seed(0)
    model = auto_model(family).from_config(AutoConfig.for_model(**{**config, "torch_dtype": "float32"}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + ("norm" in name))
    model = model.to(torch_dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=not fused)
    return model


def gated(checkpoint: Checkpoint, layer: int, expert: int) -> tuple[Source, Source, Source]:
    """Gate, up and down of one expert, or of a dense layer."""
    spec = checkpoint.spec
    return checkpoint.gated(spec.layers[layer].feed_forward.origin(spec.place(layer, checkpoint.native)), expert)


def packed(source: Path, mix: str = "auto") -> Store:
    """The store of a checkpoint, packed beside it and checked."""
    store, checkpoint = source.with_name(f"{source.name}-store"), Checkpoint.open(source)
    pack(checkpoint, store, parse_mix(mix, checkpoint.native))
    return Store.open(store, check=True)


def flip_bit(path: Path, position: int) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
