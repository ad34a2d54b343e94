"""Logits are at least as near to fp32 as transformers in bf16, and the same bits however a prompt is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from oracle import Oracle
from steps import greedy, in_chunks, open_engine, step

from hybrid.config import EngineConfig
from hybrid.core import Batch
from hybrid.engine.engine import Engine
from hybrid.errors import KernelError, StepCancelled
from hybrid.plan.resolve import EMBEDDED_MODEL
from hybrid.text.tokenizer import load_tokenizer

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GROWING = {**YARN, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5, "mscale": 1.0}
UNTRUNCATED = {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
SHARP = {"initializer_range": 0.1}  # scores that differ enough for rope to matter, where nothing norms the queries
NO_TIE = {"num_local_experts": 2, "router_jitter_noise": 0.0}  # both weigh 1: no near-tie decides
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied, biases": ("llama", SHARP),
    "llama untied": ("llama", {"tie_word_embeddings": False, "attention_bias": False, **SHARP}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR, **SHARP}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3, **SHARP}),
    "qwen3 tied": ("qwen3", {}),
    "qwen3 untied, window": (
        "qwen3",
        {
            "tie_word_embeddings": False,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
            "attention_bias": True,
            **SHARP,
        },
    ),
    "qwen3 yarn rope": ("qwen3", {"rope_parameters": YARN}),
    "mixtral": ("mixtral", {}),
    "mixtral tied, window": ("mixtral", {"tie_word_embeddings": True, "sliding_window": 9}),
    "qwen3_moe, one layer dense": ("qwen3_moe", {}),
    "qwen3_moe tied, half dense": (
        "qwen3_moe",
        {"tie_word_embeddings": True, "num_hidden_layers": 4, "mlp_only_layers": [], "decoder_sparse_step": 2},
    ),
    "qwen3_moe, all routed": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": False}),
    "qwen2_moe, one layer dense": ("qwen2_moe", {}),
    "qwen2_moe tied, windows": (
        "qwen2_moe",
        {
            "tie_word_embeddings": True,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            **SHARP,
        },
    ),
    "gpt_oss": ("gpt_oss", SHARP),
    "gpt_oss, full first": (
        "gpt_oss",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": False,
            "num_experts_per_tok": 6,  # of 6: no near-tie decides
            **SHARP,
        },
    ),
    "llama, biases in the feed-forward": ("llama", {"mlp_bias": True, **SHARP}),
    "qwen2": ("qwen2", SHARP),
    "qwen2 tied, window": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
            **SHARP,
        },
    ),
    "mistral, window": ("mistral", SHARP),
    "smollm3, the fourth layer without rope": ("smollm3", {"tie_word_embeddings": True, **SHARP}),
    "smollm3, windows without rope, biases": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 1],
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": 20,
            "attention_bias": True,
            "mlp_bias": True,
            **SHARP,
        },
    ),
    "seed_oss": ("seed_oss", SHARP),
    "seed_oss, biases of outputs alone": (
        "seed_oss",
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, **SHARP},
    ),
    "dots1": ("dots1", {}),
    "dots1, groups, the last layer with a window": (
        "dots1",
        {
            "n_group": 2,
            "topk_group": 2,
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            "norm_topk_prob": False,
            "sliding_window": 20,
            "max_window_layers": 1,
            "first_k_dense_replace": 0,
            **SHARP,
        },
    ),
    "glm4": ("glm4", SHARP),
    "glm4, no biases, all of a head turns": (
        "glm4",
        {"attention_bias": False, "partial_rotary_factor": 1.0, "tie_word_embeddings": True, **SHARP},
    ),
    "olmo2": ("olmo2", SHARP),
    "olmo2, biases, a key head for each query head": (
        "olmo2",
        {"attention_bias": True, "num_key_value_heads": 6, "tie_word_embeddings": True, **SHARP},
    ),
    "olmo3, windows, yarn where there is none": ("olmo3", SHARP),
    "olmo3, every fourth layer without a window": ("olmo3", {"layer_types": None, **SHARP}),
    "lfm2_moe": ("lfm2_moe", {}),
    "lfm2_moe untied, no corrections, not renormalised": (
        "lfm2_moe",
        {
            "tie_word_embeddings": False,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            "num_dense_layers": 0,
            "conv_bias": True,
        },
    ),
    "exaone_moe": ("exaone_moe", SHARP),
    "exaone_moe, groups": (
        "exaone_moe",
        {
            "layer_types": None,
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"],
            "n_group": 2,
            "topk_group": 2,
            "num_experts_per_tok": 8,
            **SHARP,
        },
    ),
    "solar_open": ("solar_open", {}),
    "solar_open, no biases": (
        "solar_open",
        {"attention_bias": False, "norm_topk_prob": False, "num_experts_per_tok": 8, **SHARP},
    ),
    "hy_v3": ("hy_v3", SHARP),
    "hy_v3, biases, the last layer dense": (
        "hy_v3",
        {
            "attention_bias": True,
            "mlp_layer_types": ["sparse", "sparse", "dense"],
            "num_experts_per_tok": 8,
            "router_scaling_factor": 1.5,
            **SHARP,
        },
    ),
    "mellum, a rope for each kind of layer": ("mellum", {"num_experts_per_tok": 8, **SHARP}),
    "minimax_m3_vl_text": ("minimax_m3_vl_text", SHARP),
    "minimax_m3_vl_text, all attend to all": (
        "minimax_m3_vl_text",
        {
            "layer_types": None,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            "routed_scaling_factor": 1.5,
            "tie_word_embeddings": True,
            **SHARP,
        },
    ),
    "laguna": ("laguna", SHARP),
    "laguna, gates by element, bounded scores": (
        "laguna",
        {
            "gating": "per-element",
            "moe_router_logit_softcapping": 0.3,
            "num_attention_heads_per_layer": None,
            "rope_parameters": None,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            "moe_routed_scaling_factor": 2.5,
            **SHARP,
        },
    ),
    "afmoe": ("afmoe", SHARP),
    "afmoe tied, no multiplier": (
        "afmoe",
        {
            "mup_enabled": False,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "num_dense_layers": 0,
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            **SHARP,
        },
    ),
    "granite": ("granite", SHARP),
    "granite tied, biases": (
        "granite",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "residual_multiplier": 1.5,
            "rms_norm_eps": 1e-3,
            **SHARP,
        },
    ),
    "ernie4_5": ("ernie4_5", SHARP),
    "ernie4_5 untied, biases": ("ernie4_5", {"tie_word_embeddings": False, "use_bias": True, **SHARP}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "hunyuan_v1_dense, stretched rope, biases": (
        "hunyuan_v1_dense",
        {
            "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 10000.0, "factor": 1.0},
            "attention_bias": True,
        },
    ),
    "glm": ("glm", SHARP),
    "glm, no biases, all of a head turns": (
        "glm",
        {"attention_bias": False, "partial_rotary_factor": 1.0, "tie_word_embeddings": True, **SHARP},
    ),
    "ministral3, late queries grow": ("ministral3", SHARP),
    "ministral3 tied, window, default rope": (
        "ministral3",
        {
            "tie_word_embeddings": True,
            "sliding_window": 20,
            "rope_parameters": {**GROWING, "rope_type": "default"},
            **SHARP,
        },
    ),
    "mistral4, late queries grow": ("mistral4", {"num_experts_per_tok": 8, **SHARP}),
    "mistral4, no latent queries, halves turn": (
        "mistral4",
        {
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            "rope_parameters": {**GROWING, "mscale_all_dim": 0.5, "partial_rotary_factor": 12 / 32},
            **SHARP,
        },
    ),
    "exaone4, the fourth layer sees everything and is not turned": ("exaone4", SHARP),
    "exaone4, no windows": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True, **SHARP},
    ),
    "olmoe": ("olmoe", {}),
    "olmoe, weights renormalised": (
        "olmoe",
        {"norm_topk_prob": True, "num_key_value_heads": 3, "num_experts_per_tok": 8},  # of 8: no near-tie decides
    ),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe, one group, no norms": (
        "glm4_moe",
        {
            "n_group": 1,
            "use_qk_norm": False,
            "attention_bias": False,
            "norm_topk_prob": False,
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            **SHARP,
        },
    ),
    "minimax_m2": ("minimax_m2", {}),
    "gemma4_text": ("gemma4_text", {}),
    "gemma4_text, dense, values of their own": (
        "gemma4_text",
        {
            "enable_moe_block": False,
            "attention_k_eq_v": False,
            "num_global_key_value_heads": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            **SHARP,
        },
    ),
    "gemma3_text, bounded logits": ("gemma3_text", {"final_logit_softcapping": 0.5}),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "ernie4_5_moe, rope matters": ("ernie4_5_moe", {"moe_k": 8, **SHARP}),  # of 8: no near-tie decides
    "ernie4_5_moe, none shared": (
        "ernie4_5_moe",
        {"moe_num_shared_experts": 0, "moe_layer_interval": 2, "tie_word_embeddings": False, **SHARP},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"moe_topk": 2}),
    "hunyuan_v1_moe, stretched rope": (
        "hunyuan_v1_moe",
        {"moe_topk": 3, "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}, "rope_theta": 10000.0},
    ),
    "cohere": ("cohere", SHARP),
    "cohere, heads normed": ("cohere", {"use_qk_norm": True, **SHARP}),
    "cohere tied, biases": ("cohere", {"tie_word_embeddings": True, "attention_bias": True, **SHARP}),
    "cohere2, in turn": ("cohere2", {"layer_types": None, "sliding_window_pattern": 2, **SHARP}),
    "cohere2_moe": ("cohere2_moe", {"num_experts_per_tok": 8, **SHARP}),  # of 8 experts
    "cohere2_moe, sigmoids, a sum, RMSNorm": (
        "cohere2_moe",
        {
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
            "shared_expert_combination_strategy": "sum",
            "rms_norm_eps": 1e-6,
            "num_experts_per_tok": 8,
            **SHARP,
        },
    ),
    "gemma2": ("gemma2", SHARP),
    "gemma2, no bounds": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True, **SHARP},
    ),
    "mimo_v2_flash": ("mimo_v2_flash", {"num_experts_per_tok": 8, **SHARP}),  # of 8 experts
    "mimo_v2_flash, values wider than keys, biases": (
        "mimo_v2_flash",
        {
            "v_head_dim": 40,
            "attention_bias": True,
            "attention_value_scale": None,
            "num_experts_per_tok": 8,
            "sliding_window_size": 9,
            **SHARP,
        },
    ),
    "granitemoe": ("granitemoe", SHARP),
    "granitemoe, no multipliers": (
        "granitemoe",
        {
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "tie_word_embeddings": True,
            "attention_bias": True,
            **SHARP,
        },
    ),
    "granitemoeshared": ("granitemoeshared", {"num_experts_per_tok": 6, **SHARP}),  # of 6 experts
    "granitemoeshared, nothing shared": ("granitemoeshared", {"shared_intermediate_size": 0, **SHARP}),
    "sarvam_moe": ("sarvam_moe", {"num_experts_per_tok": 8, "topk_group": 2, **SHARP}),  # of 8 experts
    "sarvam_mla": ("sarvam_mla", {"num_experts_per_tok": 8, **SHARP}),
    "flex_olmo": ("flex_olmo", {"num_experts_per_tok": 8, "norm_topk_prob": True, **SHARP}),
    "bamba": ("bamba", SHARP),
    "bamba, biases, two layers that attend": (
        "bamba",
        {"attn_layer_indices": [0, 2], "attention_bias": True, "mlp_bias": True, "mamba_n_groups": 1, **SHARP},
    ),
    "deepseek_v2": ("deepseek_v2", SHARP),
    "deepseek_v2, groups, latent queries": (
        "deepseek_v2",
        {
            "q_lora_rank": 36,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,  # of the 4 that two groups have
            "routed_scaling_factor": 4.0,
            "attention_bias": True,
            "rope_scaling": {
                **YARN,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "deepseek_v3": ("deepseek_v3", SHARP),
    "deepseek_v3, halves turn, one group": (
        "deepseek_v3",
        {
            "rope_interleave": False,
            "q_lora_rank": None,
            "n_group": 1,
            "norm_topk_prob": False,
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            **SHARP,
        },
    ),
    "deepseek_v3, biases": (
        "deepseek_v3",
        {"attention_bias": True, "rope_scaling": None, "n_group": 1, "num_experts_per_tok": 8, **SHARP},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", SHARP),
    "glm4_moe_lite, all routed": (
        "glm4_moe_lite",
        {"mlp_layer_types": ["sparse"] * 3, "rope_interleave": False, "num_experts_per_tok": 8, **SHARP},
    ),
    "deepseek_v32": ("deepseek_v32", SHARP),
    "deepseek_v32, biases, one group": (
        "deepseek_v32",
        {"attention_bias": True, "n_group": 1, "num_experts_per_tok": 8, **SHARP},  # of 8: no near-tie decides
    ),
    "glm_moe_dsa": ("glm_moe_dsa", SHARP),
    "glm_moe_dsa, named layers, as many tokens as are selected": (
        "glm_moe_dsa",
        {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "index_topk": 70,
            "indexer_types": ["full", "shared", "shared"],
            "num_experts_per_tok": 8,
            **SHARP,
        },
    ),
    "glm5_next_text": ("glm5_next_text", SHARP),
    "glm5_next_text, no bound, words as published": (
        "glm5_next_text",
        {
            "linear_attn_config": {"head_dim": 20, "num_heads": 3, "gate_lower_bound": None, "safe_gate": False},
            "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
            "attention_bias": True,
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            "hc_mult": 2,
            **SHARP,
        },
    ),
    "deepseek_v4": ("deepseek_v4", {"index_topk": 64}),  # no near-tie of entries decides
    "deepseek_v4, entries are selected, layers and words of the older style": (
        "deepseek_v4",
        {
            **{"layer_types": None, "mlp_layer_types": None, "compress_ratios": [4, 0, 4, 0], "num_hash_layers": 2},
            **{"index_topk": 16, "index_n_heads": 32, "num_experts_per_tok": 8, "hc_mult": 3},
        },
    ),
    "gemma3_text": ("gemma3_text", SHARP),
    "gemma3_text untied, biases": (
        "gemma3_text",
        {
            "tie_word_embeddings": False,
            "attention_bias": True,
            "layer_types": None,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
            **SHARP,
        },
    ),
    "phi3, longer than the original context": ("phi3", SHARP),
    "phi3 tied, window, default rope": (
        "phi3",
        {
            "tie_word_embeddings": True,
            "sliding_window": 20,
            "rope_scaling": None,
            "partial_rotary_factor": 1.0,
            **SHARP,
        },
    ),
    "phimoe, longer than the original context": ("phimoe", {**NO_TIE, **SHARP}),
    "phimoe tied, no biases, default rope": (
        "phimoe",
        {
            "tie_word_embeddings": True,
            "attention_bias": False,
            "lm_head_bias": False,
            **NO_TIE,
            "rope_scaling": None,
            "sliding_window": 20,
            **SHARP,
        },
    ),
    "kimi_linear": ("kimi_linear", {"num_experts_per_tok": 8}),  # of 8 experts: no near-tie decides
    "kimi_linear, latent queries, every fifth layer attends": (
        "kimi_linear",
        {
            "num_experts_per_tok": 8,
            "q_lora_rank": 36,
            "num_hidden_layers": 5,
            "linear_attn_config": {"head_dim": 40, "num_heads": 2, "short_conv_kernel_size": 5},
        },
    ),
    "bailing_hybrid": ("bailing_hybrid", {"num_experts_per_tok": 8, "topk_group": 2}),
    "bailing_hybrid, unbounded decays, latent queries, groups of layers": (
        "bailing_hybrid",
        {
            "num_experts_per_tok": 8,
            "topk_group": 2,
            "kda_safe_gate": False,
            "q_lora_rank": 36,
            "layer_types": None,
            "layer_group_size": 2,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", {}),
    "olmo_hybrid tied, rope, small betas, more value heads": (
        "olmo_hybrid",
        {
            "tie_word_embeddings": True,
            "rope_theta": 5e5,
            "linear_allow_neg_eigval": False,
            "linear_num_value_heads": 6,
            "layer_types": None,
            "attention_bias": True,
        },
    ),
    "qwen3_next": ("qwen3_next", {"num_experts_per_tok": 8}),  # of 8 experts: no near-tie decides
    "qwen3_next tied, longer keys, not renormalised": (
        "qwen3_next",
        {
            "num_experts_per_tok": 8,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "mlp_only_layers": [],
            "linear_key_head_dim": 40,
            "linear_num_value_heads": 6,
            "full_attention_interval": 2,
            "rope_parameters": {**YARN, "partial_rotary_factor": 0.5},
        },
    ),
    "granitemoehybrid": ("granitemoehybrid", {"num_experts_per_tok": 6, **SHARP}),  # of 6 experts
    "granitemoehybrid tied, dense, steps within limits": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "tie_word_embeddings": True,
            "mamba_n_groups": 1,
            "mamba_conv_bias": False,
            "mamba_d_conv": 3,
            "mamba_d_head": "auto",
            "time_step_limit": [0.5, 0.7],
            "position_embedding_type": "rope",
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
            **SHARP,
        },
    ),
    "granitemoehybrid, every layer attends": (
        "granitemoehybrid",
        {
            "layer_types": ["attention"] * 3,
            "position_embedding_type": "rope",
            "num_experts_per_tok": 6,
            **SHARP,
        },
    ),
    "nemotron_h": ("nemotron_h", {"num_experts_per_tok": 8, "topk_group": 2, **SHARP}),  # of 8 experts
    "nemotron_h, latents": (
        "nemotron_h",
        {"moe_latent_size": 40, "num_experts_per_tok": 8, "topk_group": 2, **SHARP},
    ),
    "nemotron_h, a pattern, no biases of convolutions": (
        "nemotron_h",
        {
            "layers_block_type": None,
            "hybrid_override_pattern": "M-*EM-",
            "use_conv_bias": False,
            "num_experts_per_tok": 8,
            "topk_group": 2,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {"num_experts_per_tok": 8}),
    "qwen4_exp_text": ("qwen4_exp_text", {"num_experts_per_tok": 8, "indexer_budget": 256}),
    "qwen3_5_text": ("qwen3_5_text", {}),
    "step3p5": ("step3p5", {"num_experts_per_tok": 6}),
    "step3p5, no bounds, ropes in lists, layers that slide have fewer heads": (
        "step3p5",
        {
            "swiglu_limits": None,
            "swiglu_limits_shared": None,
            "num_sliding_attention_heads": 2,
            "num_experts_per_tok": 8,  # of 8: no near-tie decides
            "rope_parameters": None,
            "rope_theta": [1e5, 1e3, 1e3, 1e5],
            "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5],
            "rope_scaling": {**LLAMA3, "high_freq_factor": 32.0},
            **SHARP,
        },
    ),
    "lfm2 tied, biases": ("lfm2", {}),
    "lfm2 untied": ("lfm2", {"tie_word_embeddings": False, "conv_bias": False}),
}


# A family's first case stands for the others where it is published in bf16, of which only reading knows. What others
# have besides, as biases and a head of its own, tests/test_store.py compares in bf16 in other families, but for these.
FIRST = {family: case for case, (family, _) in reversed(CASES.items())}
BF16 = (*FIRST.values(), "llama, biases in the feed-forward", "deepseek_v3, biases", "nemotron_h, latents")


@pytest.mark.parametrize(("case", "dtype"), [*((case, "fp32") for case in CASES), *((case, "bf16") for case in BF16)])
def test_logits_are_nearer_to_fp32_than_transformers_in_bf16(tmp_path, case, dtype) -> None:
    """Every case in fp32, those of `BF16` in bf16 too: that makes another reader, and no other step."""
    family, changes = CASES[case]
    ours, theirs = [], []
    for seed in range(3):
        wanted = oracle.save(tmp_path / f"{seed}", family, dtype=dtype, seed=seed, **changes)
        with open_engine(wanted.path, tmp_path / "cache") as engine:
            ours.append(wanted.error(step(engine, (0, 0, wanted.tokens))))
        theirs.append(wanted.bf16_error)
    print(f"{case}, {dtype}: {oracle.together(ours):.2e}, transformers in bf16 {oracle.together(theirs):.2e}")
    assert 0 < oracle.together(ours) <= oracle.together(theirs)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama linear rope", {"rope_parameters": {**LINEAR, "factor": 3.3}}),
        ("llama llama3 rope", {"rope_parameters": {**LLAMA3, "high_freq_factor": 4.5}}),
        ("qwen3 yarn rope", {"rope_parameters": {**YARN, "factor": 4.5}}),
        ("qwen3 untied, window", {"sliding_window": 21}),
        ("mixtral tied, window", {"sliding_window": 10}),
        ("qwen3_moe, one layer dense", {"norm_topk_prob": False}),
        ("qwen3_moe, one layer dense", {"rms_norm_eps": 1e-4}),
        ("qwen2_moe tied, windows", {"norm_topk_prob": False}),
        ("gpt_oss", {"sliding_window": 21}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("bailing_hybrid", {"kda_lower_bound": -4.0}),
        ("step3p5", {"swiglu_limits_shared": [0.3, 0.0, 0.0, 0.0]}),
        ("step3p5", {"swiglu_limits": [0.0, 0.3, 0.0, 0.0]}),
        (
            "deepseek_v3, halves turn, one group",
            {"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.5}},
        ),
        ("deepseek_v2, groups, latent queries", {"topk_group": 3}),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}),
        ("gpt_oss", {"rope_parameters": {**UNTRUNCATED, "truncate": True}}),
        (
            "ministral3 tied, window, default rope",
            {"rope_parameters": {**GROWING, "rope_type": "default", "llama_4_scaling_beta": 0.6}},
        ),
        (
            "mistral4, no latent queries, halves turn",
            {"rope_parameters": {**GROWING, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0}},
        ),
    ],
    ids=str,
)
def test_a_slightly_wrong_model_is_further_off(tmp_path, case, change) -> None:
    """So that the comparison above is known to see it."""
    family, changes = CASES[case]
    wanted = oracle.save(tmp_path / "hf", family, **changes)
    exact, rounding = wanted.exact, wanted.bf16_error  # of what is saved, before it is changed
    file = wanted.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with open_engine(wanted.path, tmp_path / "cache") as engine:
        logits = step(engine, (0, 0, wanted.tokens))
    assert np.linalg.norm(logits - exact) > 2 * rounding * np.linalg.norm(exact)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return oracle.save(tmp_path_factory.mktemp("moe") / "hf", "qwen3_moe", length=100)


@pytest.fixture
def opened(saved: Oracle) -> Iterator[Callable[..., Engine]]:
    """Engines of the saved model, closed at the end."""
    engines: list[Engine] = []

    def open_one(**choices: Any) -> Engine:
        engines.append(open_engine(saved.path, saved.path.parent / "cache", **choices))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_instruction_set_reaches_that_on_any_number_of_threads(isa, threads, saved, opened) -> None:
    engine = opened(isa=isa, threads=threads)
    assert (engine.plan.isa, engine.plan.threads) == (isa, threads)
    logits = step(engine, (0, 0, saved.tokens))
    assert saved.error(logits) <= saved.bf16_error
    assert np.array_equal(logits, step(opened(isa=isa, threads=1), (0, 0, saved.tokens)))


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_logits_are_the_same_bits_in_chunks_of_any_size(saved, opened, size) -> None:
    engine = opened()
    whole = step(engine, (0, 0, saved.tokens))
    assert np.array_equal(whole, in_chunks(engine, saved.tokens, size, slot=1))


def test_logits_are_the_same_bits_alone_and_among_other_sequences(saved, opened) -> None:
    engine, tokens = opened(), saved.tokens
    alone = step(engine, (0, 0, tokens))
    step(engine, (1, 0, tokens[::-1][:40]))
    step(engine, (3, 0, tokens[:20]))
    together = step(engine, (1, 40, tokens[:1]), (2, 0, tokens), (3, 20, tokens[5:10]))
    assert np.array_equal(alone, together[1:101])


@pytest.mark.parametrize("family", ["ministral3", "mistral4"])
def test_queries_that_grow_are_the_same_bits_in_chunks_and_among_others(tmp_path, isa, family) -> None:
    """Of rows of one step some are before the original context's end, some behind it."""
    saved = oracle.save(tmp_path / "hf", family, **SHARP)
    tokens = saved.tokens
    with open_engine(saved.path, tmp_path / "cache", isa=isa) as engine:
        whole = step(engine, (0, 0, tokens))
        for size in (1, 7):
            assert np.array_equal(whole, in_chunks(engine, tokens, size, slot=1)), size
        step(engine, (2, 0, tokens[:40]))
        together = step(engine, (2, 40, tokens[40:41]), (3, 0, tokens), (1, 3, tokens[3:5]))
        assert np.array_equal(whole[40:41], together[:1]) and np.array_equal(whole, together[1:71])


def test_a_rewound_slot_goes_on_as_if_it_had_never_gone_further(saved, opened) -> None:
    engine, tokens = opened(), saved.tokens
    whole = step(engine, (0, 0, tokens))
    step(engine, (0, 50, tokens[::-1][:50]))
    assert np.array_equal(whole[50:], step(engine, (0, 50, tokens[50:])))
    engine.release(0)
    assert np.array_equal(whole, step(engine, (0, 0, tokens)))


def test_a_recurrent_state_makes_the_same_bits_in_chunks_beside_others_and_when_freed(tmp_path) -> None:
    saved = oracle.save(tmp_path / "hf", "lfm2")
    tokens = saved.tokens
    with open_engine(saved.path, tmp_path / "cache") as engine:
        whole = step(engine, (0, 0, tokens))
        assert np.array_equal(whole, in_chunks(engine, tokens, 1, slot=1))
        step(engine, (2, 0, tokens[::-1][:20]))
        assert np.array_equal(whole, step(engine, (2, 20, tokens[:1]), (3, 0, tokens))[1:])
        engine.release(0)
        assert np.array_equal(whole, in_chunks(engine, tokens, 7, slot=0))


def test_greedy_tokens_are_the_same_on_every_path(saved, opened) -> None:
    prompt = saved.tokens[:30]
    expected = greedy(opened(), prompt, 30)
    assert len(set(expected)) > 1
    assert expected == greedy(opened(threads=1), prompt, 1, slot=3)
    assert expected == greedy(opened(threads=3), prompt, 7, slot=2)


def test_only_the_wanted_logits_are_made(saved, opened) -> None:
    engine, tokens = opened(max_batch=2), saved.tokens[:10].astype(np.int32)
    rows = np.arange(10, dtype=np.int32)
    whole = step(engine, (0, 0, tokens))
    for wanted in ([], [9], [0, 3, 9]):
        batch = Batch(tokens, 0 * rows, rows, np.array(wanted, np.int32))
        assert np.array_equal(engine.forward(batch).logits, whole[wanted])


def test_times_of_a_step_add_up(saved, opened) -> None:
    rows = np.arange(50, dtype=np.int32)
    times = opened().forward(Batch(saved.tokens[:50], 0 * rows, rows, rows[-1:])).times
    parts = (times.attention, times.moe, times.head, times.other)
    assert min(parts) > 0 and sum(parts) == pytest.approx(times.total)


def test_steps_outside_the_plan_are_refused(saved, opened) -> None:
    engine = opened(max_seq_len=64, max_batch=2, chunk_size=32)
    for part, message in [
        ((0, 0, saved.tokens[:33]), "33 rows; planned for 1 to 32"),
        ((2, 0, saved.tokens[:1]), "sequence 2 of 2"),
        ((0, 64, saved.tokens[:1]), "position 64 of 64"),
        ((0, 0, np.array([131])), "token id 131 is outside the vocabulary of 131"),
    ]:
        with pytest.raises(KernelError, match=message):
            step(engine, part)
    assert len(step(engine, (1, 63, saved.tokens[:1]))) == 1


def test_a_closed_engine_says_so_and_is_closed_once(saved, opened) -> None:
    engine = opened()
    for _ in range(2):
        engine.close()
        engine.cancel()
        engine.release(0)
    with pytest.raises(KernelError, match="closed"):
        step(engine, (0, 0, saved.tokens[:1]))


def test_a_cancelled_step_raises_and_the_next_one_is_whole(saved, opened) -> None:
    engine = opened()
    whole = step(engine, (0, 0, saved.tokens))
    engine.cancel()
    with pytest.raises(StepCancelled):
        step(engine, (0, 0, saved.tokens))
    assert np.array_equal(whole, step(engine, (0, 0, saved.tokens)))


def test_the_embedded_model_says_the_same_on_every_instruction_set(isa, tmp_path) -> None:
    """The median row: rounding may send a near-tie to another expert, and that row is far off, then."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    assert tokenizer is not None
    tokens = np.array(tokenizer.encode("Once upon a time, there was a little fox named Molly. She lived in a den."))
    logits = []
    for name in ("portable", isa):
        with Engine.open(EngineConfig(cache_dir=tmp_path, isa=name, max_seq_len=256)) as engine:
            logits.append(step(engine, (0, 0, tokens)))
    errors = np.linalg.norm(logits[1] - logits[0], axis=1) / np.linalg.norm(logits[0], axis=1)
    assert np.median(errors) <= 0.01, errors
