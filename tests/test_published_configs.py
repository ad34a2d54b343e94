"""Configurations as they are published for models of several kinds of layers: all is read, or of no effect."""

from __future__ import annotations

from typing import Any

import pytest
from configs import CONFIGS

from hybrid.models import model_spec
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.plan.fit import parameters

_NOISE: dict[str, Any] = {  # of no effect in any of them
    "architectures": ["XForCausalLM"], "auto_map": {"AutoConfig": "configuration_x.XConfig"}, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": [2, 24], "pad_token_id": 0, "dtype": "bfloat16", "torch_dtype": "bfloat16",
    "initializer_range": 0.02, "transformers_version": "4.57.3", "use_cache": True, "output_router_logits": False,
    "tie_word_embeddings": False, "hidden_act": "silu", "rope_scaling": None,
}  # fmt: skip
_NANO: dict[str, Any] = {
    "model_type": "nemotron_h", "attention_bias": False, "chunk_size": 128, "conv_kernel": 4, "expand": 2,
    "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 2688, "intermediate_size": 1856,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64, "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144, "mlp_bias": False,
    "mlp_hidden_act": "relu2", "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1, "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1, "norm_eps": 1e-05,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 52,
    "num_key_value_heads": 2, "num_logits_to_keep": 1, "partial_rotary_factor": 1.0, "rescale_prenorm_residual": True,
    "residual_in_fp32": False, "rope_theta": 10000, "routed_scaling_factor": 2.5, "sliding_window": None,
    "ssm_state_size": 128, "time_step_floor": 0.0001, "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1,
    "time_step_min": 0.001, "topk_group": 1, "use_bias": False, "use_conv_bias": True, "use_mamba_kernels": True,
    "vocab_size": 131072,
}  # fmt: skip
_TINY: dict[str, Any] = {
    "model_type": "granitemoehybrid", "attention_bias": False, "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12, "hidden_size": 1536, "init_method": "mup", "intermediate_size": 512,
    "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)], "logits_scaling": 6,
    "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128,
    "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 48, "mamba_proj_bias": False,
    "max_position_embeddings": 131072, "normalization_function": "rmsnorm", "num_attention_heads": 12,
    "num_experts_per_tok": 6, "num_hidden_layers": 40, "num_key_value_heads": 4, "num_local_experts": 64,
    "position_embedding_type": "nope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_theta": 10000,
    "router_aux_loss_coef": 0.0001, "shared_intermediate_size": 1024, "tie_word_embeddings": True,
    "vocab_size": 100352,
}  # fmt: skip
_LING: dict[str, Any] = {
    "model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"], "embedding_dropout": 0.0,
    "expert_swiglu_limit_list": None, "share_expert_swiglu_limit_list": None, "linear_attention": "kda",
    "gated_attention_proj_granularity_type": "head_wise", "group_norm_size": 1, "head_dim": 128, "hidden_size": 2560,
    "intermediate_size": 6144, "kda_lower_bound": -5, "kda_safe_gate": True, "kv_lora_rank": 512,
    "layer_group_size": 6, "max_position_embeddings": 262144, "max_window_layers": 20, "moe_intermediate_size": 768,
    "moe_router_enable_expert_bias": True, "moe_shared_expert_intermediate_size": 768, "mtp_use_kda": False,
    "n_group": 8, "no_kda_lora": True, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 512,
    "num_experts_per_tok": 8, "num_hidden_layers": 42, "num_key_value_heads": 32, "num_kv_heads_for_linear_attn": 0,
    "num_nextn_predict_layers": 1, "num_shared_experts": 1, "q_lora_rank": None, "qk_head_dim": 192,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_interleave": True,
    "rope_theta": 6000000, "rotary_dim": 64, "partial_rotary_factor": 0.5, "router_dtype": "fp32",
    "routed_scaling_factor": 2.5, "scale_router_input": False, "score_function": "sigmoid",
    "short_conv_kernel_size": 4, "topk_group": 4, "use_bias": False, "use_kda_lora": False, "use_mla_nope": False,
    "use_qk_norm": True, "use_qkv_bias": False, "use_rmsnorm": True, "v_head_dim": 128, "value_norm": False,
    "vocab_size": 157184, "first_k_dense_replace": 2,
}  # fmt: skip
_KINDS = ["sliding_attention"] * 3 + ["full_attention"]
_LAGUNA: dict[str, Any] = {
    "model_type": "laguna", "attention_bias": False, "decoder_sparse_step": 1, "gating": "per-head",
    "gating_types": ["per_head"] * 40, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 8192,
    "layer_types": [*reversed(_KINDS)] * 10, "max_position_embeddings": 262144,
    "mlp_layer_types": ["dense"] + ["sparse"] * 39, "mlp_only_layers": [0], "moe_apply_router_weight_on_input": False,
    "moe_intermediate_size": 512, "moe_routed_scaling_factor": 2.5, "moe_router_logit_softcapping": 0.0,
    "norm_topk_prob": True, "num_attention_heads": 48, "num_attention_heads_per_layer": [48, 64, 64, 64] * 10,
    "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "partial_rotary_factor": 0.5, "qkv_bias": False, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn", "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192,
            "beta_slow": 1.0, "beta_fast": 64.0, "attention_factor": 1.3465735902799727, "partial_rotary_factor": 0.5,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    },
    "shared_expert_intermediate_size": 512, "sliding_window": 512, "swa_attention_sink_enabled": False,
    "vocab_size": 100352,
}  # fmt: skip
_TRINITY: dict[str, Any] = {
    "model_type": "afmoe", "global_attn_every_n_layers": 4, "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "layer_types": _KINDS * 8, "load_balance_coeff": 0.001,
    "max_position_embeddings": 131072, "moe_intermediate_size": 1024, "mup_enabled": True, "n_group": 1,
    "num_attention_heads": 32, "num_dense_layers": 2, "num_expert_groups": 1, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 32, "num_key_value_heads": 4, "num_limited_groups": 1,
    "num_shared_experts": 1, "rms_norm_eps": 1e-05, "rope_theta": 10000, "route_norm": True, "route_scale": 2.826,
    "score_func": "sigmoid", "sliding_window": 2048, "topk_group": 1, "use_grouped_mm": True, "vocab_size": 200192,
}  # fmt: skip
_SPARSE = [0] * 3 + [1] * 57
_M3: dict[str, Any] = {
    "model_type": "minimax_m3_vl", "image_token_index": 200025, "projector_hidden_size": 6144,
    "img_token_compression_config": {"image_token_compression_method": "patch_merge", "spatial_merge_size": 2},
    "vision_config": {"hidden_size": 1280},
    "text_config": {
        "model_type": "minimax_m3", "hidden_size": 6144, "intermediate_size": 3072, "dense_intermediate_size": 12288,
        "shared_intermediate_size": 3072, "num_hidden_layers": 60, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 200064, "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6, "use_gemma_norm": True, "attention_output_gate": False, "rope_theta": 5000000,
        "rotary_dim": 64, "partial_rotary_factor": 0.5, "hidden_act": "swigluoai", "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0, "use_qk_norm": True, "qk_norm_type": "per_head", "num_local_experts": 128,
        "num_experts_per_tok": 4, "n_shared_experts": 1, "scoring_func": "sigmoid", "use_routing_bias": True,
        "routed_scaling_factor": 2.0, "moe_layer_freq": _SPARSE, "num_mtp_modules": 7,
        "sparse_attention_config": {
            "use_sparse_attention": True, "sparse_index_dim": 128, "sparse_num_index_heads": 4,
            "sparse_topk_blocks": 16, "sparse_block_size": 128, "sparse_disable_index_value": _SPARSE,
            "sparse_score_type": "max", "sparse_init_block": 0, "sparse_local_block": 1,
            "sparse_attention_freq": _SPARSE,
        },
    },
}  # fmt: skip
_V4: dict[str, Any] = {
    "model_type": "deepseek_v4", "attention_bias": False, "expert_dtype": "fp4", "hc_eps": 1e-06, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "head_dim": 512, "hidden_size": 4096, "index_head_dim": 128, "index_n_heads": 64,
    "index_topk": 512, "max_position_embeddings": 1048576, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 6,
    "num_hidden_layers": 43, "num_hash_layers": 3, "num_key_value_heads": 1, "num_nextn_predict_layers": 1,
    "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "sliding_window": 128,
    "swiglu_limit": 10.0, "topk_method": "noaux_tc", "vocab_size": 129280, "compress_rope_theta": 160000,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip
_GLM: dict[str, Any] = {  # as transformers has it by default
    "model_type": "glm5_next",
    "text_config": {
        "model_type": "glm5_next_text", "vocab_size": 154880, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 2048, "num_hidden_layers": 45, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_shared_experts": 1, "n_routed_experts": 288, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 0, "v_head_dim": 256, "qk_nope_head_dim": 256,
        "head_dim": 0, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 32, "index_kpool": 16,
        "index_kpool_always_select_tail": True, "swiglu_limit": 10.0, "hc_mult": 4, "hc_eps": 1e-6,
        "hc_sinkhorn_iters": 20, "linear_head_dim": 128, "linear_num_heads": 64, "linear_conv_kernel_dim": 4,
        "linear_lower_bound": -5.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 1048576,
    },
}  # fmt: skip
_QWEN4: dict[str, Any] = {
    "model_type": "qwen4_exp_text", "vocab_size": 248320, "max_position_embeddings": 262144, "hidden_size": 2560,
    "num_hidden_layers": 48, "full_attention_interval": 4, "hc_count": 4, "hc_lowrank": 320, "head_dim": 256,
    "num_attention_heads": 24, "num_key_value_heads": 2, "indexer_n_heads": 4, "indexer_kv_heads": 1,
    "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4, "linear_num_key_heads": 16,
    "linear_num_value_heads": 48, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True,
    "moe_intermediate_size": 640, "shared_expert_intermediate_size": 640, "ngram_size": 3, "heads_per_ngram": 8,
    "ple_embed_dim": 2560, "ple_conv_kernel_size": 4, "ple_layer_ids": [2], "ngram_vocab_size_base": 20000000,
    "make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 128, "seed": 1234, "rms_norm_eps": 1e-6,
    "output_gate_type": "sigmoid", "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000000, "mrope_interleaved": True, "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
_STEP: dict[str, Any] = {
    "model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"], "att_impl_type": "GQA", "bos_token_id": 0,
    "attention_other_setting": {
        "attention_type": "sliding_attention", "num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128,
        "true_head_dim": 128,
    },
    "eos_token_id": [1, 2, 128007], "head_dim": 128, "hidden_size": 4096, "intermediate_size": 11264,
    "layer_types": [*reversed(_KINDS)] * 12, "max_position_embeddings": 262144, "max_seq_len": 262144,
    "moe_every_n_layer": 1, "moe_intermediate_size": 1280, "moe_layer_offset": 0,
    "moe_layers_enum": ",".join(map(str, range(3, 45))), "moe_num_experts": 288, "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0, "moe_top_k": 8, "need_fp32_gate": True, "norm_expert_weight": True,
    "num_attention_groups": 8, "num_attention_heads": 64, "num_hidden_layers": 45, "num_nextn_predict_layers": 3,
    "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0] * 12, "rms_norm_eps": 1e-05, "rope_scaling": {
        "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 131072, "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
    },
    "rope_theta": [5000000.0, 10000.0, 10000.0, 10000.0] * 12, "share_expert_dim": 1280, "sink": False,
    "sliding_window": 512, "swiglu_limits": [0.0] * 43 + [7, 7, 0.0, 0.0, 0.0],
    "swiglu_limits_shared": [0.0] * 44 + [16, 0.0, 0.0, 0.0], "tie_word_embeddings": False,
    "use_head_wise_attn_gate": True, "use_moe": True, "use_moe_router_bias": True, "use_qk_norm": True,
    "use_rope_layers": [], "vocab_size": 128896, "yarn_only_types": ["full_attention"], "zero_centered": True,
}  # fmt: skip
# Each with how many billions of parameters there are, and how many of them a token multiplies with.
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "Nemotron 3 Nano": (_NANO, 31.6, 3.3),
    "Granite 4.0 H Tiny": (_TINY, 6.9, 1.5),
    "Granite 4.0 H Micro": (
        {
            **_TINY,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "shared_intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "mamba_n_heads": 64,
        },
        3.2,
        3.2,
    ),  # fmt: skip
    "Ling 3.0 Flash": (_LING, 124.4, 5.2),
    "Laguna XS": (_LAGUNA, 33.4, 2.8),
    "Trinity Mini": (_TRINITY, 26.1, 3.1),
    "MiniMax-M3": (_M3, 426.2, 24.7),
    "DeepSeek-V4-Flash": (_V4, 284.3, 13.3),
    "GLM-5.3-Flash": (_GLM, 313.3, 16.8),
    "Step-3.5-Flash": (_STEP, 197.0, 11.5),
    "Qwen3.8-Flash-Next": (_QWEN4, 176.9, 6.8),  # 51.2 of them in a table
}


def test_no_token_multiplies_with_more_parameters_than_there_are() -> None:
    """States are no parameters, even where all these are multiplied with."""
    total, used = parameters(model_spec(PUBLISHED["Granite 4.0 H Micro"][0]))
    assert used == total


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_as_many_parameters_as_their_models(name: str) -> None:
    config, total, used = PUBLISHED[name]
    assert [round(count / 1e9, 1) for count in parameters(model_spec({**_NOISE, **config}))] == [total, used]


def test_older_words_mean_what_newer_ones_do() -> None:
    nano = {key: value for key, value in _NANO.items() if key not in ("head_dim", "time_step_limit")}
    words = {"attention_head_dim": 128, "mamba_dt_limit": [0.0, 5.0]}
    assert model_spec({**nano, **words}) == model_spec({**_NANO, "time_step_limit": [0.0, 5.0]})
    kinds = {key: value for key, value in _TINY.items() if key != "layer_types"}
    assert model_spec({**kinds, "layers_block_type": _TINY["layer_types"]}) == model_spec(_TINY)


def test_how_much_of_a_head_turns_is_a_part_or_a_number_of_dimensions() -> None:
    config = CONFIGS["minimax_m3_vl_text"]
    assert model_spec({**config, "partial_rotary_factor": None}) == model_spec(config)
    assert model_spec({**config, "partial_rotary_factor": None, "rotary_dim": 8}) != model_spec(config)


def test_laguna_reads_ropes_dense_layers_and_windows_of_older_configurations() -> None:
    config, ropes = CONFIGS["laguna"], CONFIGS["laguna"]["rope_parameters"]
    apart = {"rope_parameters": ropes["full_attention"], "swa_rope_parameters": ropes["sliding_attention"]}
    assert model_spec({**config, **apart}) == model_spec(config)
    inner = {"rope_parameters": {"full_attention": ropes["full_attention"]}}
    assert model_spec({**config, **inner, "swa_rope_parameters": ropes["sliding_attention"]}) == model_spec(config)
    one = model_spec({**config, "rope_parameters": {"rope_theta": 7e4}, "partial_rotary_factor": 0.5})
    found = {mixer.rope for mixer in (layer.mixer for layer in one.layers) if isinstance(mixer, GroupedQueryAttention)}
    assert {(rope.theta, rope.dim) for rope in found if rope} == {(7e4, 12)}
    dense = [layer.feed_forward.is_moe for layer in model_spec({**config, "mlp_only_layers": [1, 2]}).layers]
    assert dense == [True, False, False]
    whole = model_spec({**config, "sliding_window": 0, "layer_types": ["full_attention"] * 3})
    assert whole == model_spec({**config, "sliding_window": None, "layer_types": ["full_attention"] * 3})


def test_limits_of_steps_beyond_every_number_are_none() -> None:
    assert model_spec({**_NANO, "time_step_limit": [0.0, 10**4000]}) == model_spec(_NANO)
