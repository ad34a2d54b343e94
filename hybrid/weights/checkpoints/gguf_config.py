"""A GGUF file's metadata as the config.json that its model had: what the families read."""

from __future__ import annotations

from collections.abc import Callable

from hybrid.errors import WeightsError
from hybrid.weights.checkpoints.gguf_architectures import COHERE, GLM5_NEXT, GROWING, INDEXED_TYPES, LATENT, NEMOTRON
from hybrid.weights.checkpoints.gguf_deepseek4 import deepseek4
from hybrid.weights.checkpoints.gguf_dense import (
    chatglm,
    cohere2,
    command_r,
    ernie4_5,
    exaone4,
    glm4,
    granite,
    hunyuan_dense,
    mistral3,
    olmo2,
    phi3,
    seed_oss,
    smollm3,
)
from hybrid.weights.checkpoints.gguf_fields import (
    SIGMOID,
    SOFTMAX,
    has,
    key_length,
    kv_heads,
    layer_count,
    query_heads,
    require_gating,
    require_weights,
    routed,
)
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_gated import afmoe, laguna, mellum, step35
from hybrid.weights.checkpoints.gguf_gemma import gemma2, gemma3, gemma4
from hybrid.weights.checkpoints.gguf_hunyuan import hunyuan_moe, hy_v3
from hybrid.weights.checkpoints.gguf_kimi import bailingmoe3, glm5_next, kimi_linear
from hybrid.weights.checkpoints.gguf_lfm2 import lfm2, lfm2_moe
from hybrid.weights.checkpoints.gguf_mamba import granite_experts, granite_hybrid, nemotron_h
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_mimo import mimo2
from hybrid.weights.checkpoints.gguf_minimax import minimax_m2, minimax_m3
from hybrid.weights.checkpoints.gguf_qwen import (
    qwen,
    qwen2_moe,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
)
from hybrid.weights.checkpoints.gguf_rope import TEMPERATURE, Config, growing, latent_scaling, rope_part, rope_scaling

EMBEDDING, HEAD, HEAD_BIAS = "token_embd.weight", "output.weight", "output.bias"
_NULLS = ("q_lora_rank", "linear_lower_bound")  # fields in which null says something


def gguf_config(model: Gguf) -> Config:
    """What the config.json of the model would say. Raises WeightsError."""
    metadata = GgufMetadata(model)
    family = _FAMILIES.get(metadata.architecture)
    if family is None:
        raise WeightsError(
            f"{model.path}: architecture {metadata.architecture!r:.60} is not supported; "
            f"supported in GGUF files: {', '.join(sorted(_FAMILIES))}"
        )
    config = {**_common(model, metadata), **family(model, metadata)}
    return {name: value for name, value in config.items() if value is not None or name in _NULLS}


def _common(model: Gguf, metadata: GgufMetadata) -> Config:
    heads, dim = query_heads(metadata)[0], key_length(metadata)
    if metadata.architecture not in (*LATENT, "mimo2") and metadata.size("attention.value_length", dim) != dim:
        raise metadata.refuse("attention.value_length", metadata.size("attention.value_length"), f"{dim}, as of keys")
    if metadata.architecture not in GROWING and metadata.number(TEMPERATURE, 0.0):
        raise metadata.refuse(TEMPERATURE, metadata.number(TEMPERATURE), "absent or 0")
    by_layer = metadata.architecture in NEMOTRON  # the family tells it
    rms = metadata.architecture not in COHERE
    if EMBEDDING not in model.tensors:
        raise WeightsError(f"{model.path}: tensor {EMBEDDING} is missing: fetch all files of the model again")
    return {
        "num_hidden_layers": layer_count(metadata),
        "hidden_size": metadata.size("embedding_length"),
        "vocab_size": model.tensors[EMBEDDING].shape[0],
        "max_position_embeddings": metadata.size("context_length"),
        "intermediate_size": None if by_layer else metadata.size("feed_forward_length", 0) or None,
        "num_attention_heads": heads,
        "num_key_value_heads": max(kv_heads(metadata)),
        "head_dim": dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon") if rms else None,
        "rope_theta": metadata.number("rope.freq_base", 10_000.0),
        "rope_scaling": rope_scaling(model, metadata),
        "partial_rotary_factor": rope_part(metadata, dim),
        "tie_word_embeddings": HEAD not in model.tensors,
        "attention_bias": has(model, "attn_q.bias") or has(model, "attn_qkv.bias"),
    }


def _llama(model: Gguf, metadata: GgufMetadata) -> Config:
    if not metadata.size("expert_count", 0):
        return {"model_type": "llama", "mlp_bias": has(model, "ffn_gate.bias")}
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=True)
    return {"model_type": "mixtral", **routed(metadata)}


def _gpt_oss(model: Gguf, metadata: GgufMetadata) -> Config:
    """The published models turn with bounds of yarn that are not rounded."""
    scaling = rope_scaling(model, metadata)
    return {
        "model_type": "gpt_oss",
        **routed(metadata),
        "intermediate_size": metadata.size("expert_feed_forward_length"),
        "sliding_window": metadata.size("attention.sliding_window"),
        "rope_scaling": {**scaling, "truncate": False} if scaling else {"rope_type": "default"},
    }


def _glm4_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    return {
        "model_type": "glm4_moe",
        **_sigmoid_experts(metadata, norm=True),
        "use_qk_norm": has(model, "attn_q_norm.weight"),
        "partial_rotary_factor": metadata.size("rope.dimension_count") / metadata.size("attention.key_length"),
    }


def _dots1(model: Gguf, metadata: GgufMetadata) -> Config:
    found = _sigmoid_experts(metadata, norm=False)
    return {"model_type": "dots1", **found, "max_window_layers": layer_count(metadata)}


def _bailingmoe2(model: Gguf, metadata: GgufMetadata) -> Config:
    """Sarvam 30B, and Ling and Ring 2.0, whose heads turn by half. Files have Sarvam's corrections less their mean, by
    which the same experts are chosen.
    """
    found, name = _sigmoid_experts(metadata, norm=True), "expert_shared_feed_forward_length"
    shared = found["moe_intermediate_size"] * found["n_shared_experts"]
    if metadata.size(name, shared) != shared:
        raise metadata.refuse(name, metadata.size(name), f"{shared}, as of expert_shared_count experts")
    return {"model_type": "sarvam_moe", **found, "use_qk_norm": has(model, "attn_q_norm.weight")}


def _exaone_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    found = _sigmoid_experts(metadata, norm=True)
    return {
        **exaone4(model, metadata),
        **found,
        "model_type": "exaone_moe",
        "num_shared_experts": found["n_shared_experts"],
    }


def _sigmoid_experts(metadata: GgufMetadata, *, norm: bool) -> Config:
    """norm: whether weights sum to 1 where nothing is said."""
    require_gating(metadata, SIGMOID, SIGMOID)
    return {
        "n_routed_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "n_shared_experts": metadata.size("expert_shared_count", 1),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "first_k_dense_replace": metadata.size("leading_dense_block_count", 0),
        "norm_topk_prob": metadata.flag("expert_weights_norm", norm),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "n_group": metadata.size("expert_group_count", 0) or 1,
        "topk_group": metadata.size("expert_group_used_count", 0) or 1,
    }


def _ernie4_5_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=True)
    return {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": metadata.size("expert_count"),
        "moe_k": metadata.size("expert_used_count"),
        "moe_layer_interval": metadata.size("interleave_moe_layer_step", 1),
        "moe_layer_start_index": metadata.size("leading_dense_block_count", 0),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "moe_num_shared_experts": metadata.size("expert_shared_count", 0),
    }


def _olmoe(model: Gguf, metadata: GgufMetadata) -> Config:
    require_gating(metadata, SOFTMAX, SOFTMAX)
    require_weights(metadata, norm=False)
    if metadata.number("attention.clamp_kqv", 0.0):
        raise metadata.refuse("attention.clamp_kqv", metadata.number("attention.clamp_kqv"), "absent or 0")
    return {"model_type": "olmoe", **routed(metadata), "norm_topk_prob": False}


def _granitemoe(model: Gguf, metadata: GgufMetadata) -> Config:
    if metadata.size("expert_shared_feed_forward_length", 0):
        return {**granite_experts(model, metadata), "model_type": "granitemoeshared"}
    require_gating(metadata, SOFTMAX, SOFTMAX)
    return {
        **granite(model, metadata),
        "model_type": "granitemoe",
        "num_local_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
    }


def _deepseek2(model: Gguf, metadata: GgufMetadata) -> Config:
    """In newer files lengths are those of latents; in older ones of keys and values."""
    last = layer_count(metadata) - 1
    sigmoid = metadata.size("expert_gating_func", 0) or (SIGMOID if has(model, "exp_probs_b.bias", last) else SOFTMAX)
    turned = metadata.size("rope.dimension_count")
    keys = metadata.size("attention.key_length_mla", metadata.size("attention.key_length", 0))
    groups = metadata.size("expert_group_count", 0) or 1
    normed = metadata.flag("expert_weights_norm", False)
    scaling = latent_scaling(metadata, rope_scaling(model, metadata))
    found = {
        "model_type": "deepseek_v3" if sigmoid == SIGMOID else "deepseek_v2",
        "num_key_value_heads": metadata.size("attention.head_count"),
        "q_lora_rank": metadata.size("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": metadata.size("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": keys - turned,
        "v_head_dim": metadata.size("attention.value_length_mla", metadata.size("attention.value_length", 0)),
        "head_dim": None,
        "partial_rotary_factor": None,
        "n_routed_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "n_shared_experts": metadata.size("expert_shared_count", 0),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "first_k_dense_replace": metadata.size("leading_dense_block_count", 0),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": normed,
        "n_group": groups,
        "topk_group": metadata.size("expert_group_used_count", 0) or 1,
        "rope_scaling": scaling,
        "attention_bias": False,
    }
    if metadata.architecture == "mistral4" or metadata.number(TEMPERATURE, 0.0):
        require_gating(metadata, SOFTMAX, SOFTMAX)
        return {**found, "model_type": "mistral4", "rope_scaling": growing(metadata, scaling, 8192)}
    return found if sigmoid == SIGMOID else {**found, "topk_method": "group_limited_greedy" if groups > 1 else "greedy"}


def _indexed(model: Gguf, metadata: GgufMetadata) -> Config:
    """Those whose attention selects tokens: their experts are always chosen by sigmoids."""
    require_gating(metadata, SIGMOID, SIGMOID)
    return {
        **_deepseek2(model, metadata),
        "model_type": INDEXED_TYPES[metadata.architecture],
        "index_topk": metadata.size("attention.indexer.top_k"),
        "index_n_heads": metadata.size("attention.indexer.head_count"),
        "index_head_dim": metadata.size("attention.indexer.key_length"),
        **_shared_indexers(model, metadata),
    }


def _shared_indexers(model: Gguf, metadata: GgufMetadata) -> Config:
    """Layers without an indexer of their own have no tensors of one. Where none has, none selects: then sequences are
    as short as need be.
    """
    layers = range(min(layer_count(metadata), len(model.tensors)))
    own = [has(model, "indexer.attn_k.weight", layer) for layer in layers]
    if any(own):
        return {"indexer_types": ["full" if its else "shared" for its in own]}
    selects = metadata.size("attention.indexer.top_k")
    return {"max_position_embeddings": min(selects, metadata.size("context_length"))}


def _phimoe(model: Gguf, metadata: GgufMetadata) -> Config:
    return {
        "model_type": "phimoe",
        **routed(metadata),
        "lm_head_bias": HEAD_BIAS in model.tensors,
        "sliding_window": metadata.size("attention.sliding_window", 0) or None,
    }


_FAMILIES: dict[str, Callable[[Gguf, GgufMetadata], Config]] = {
    "llama": _llama,
    "qwen2vl": qwen,
    "qwen3vl": qwen,
    "qwen3vlmoe": qwen3_moe,
    "qwen2": qwen,
    "qwen3": qwen,
    "qwen2moe": qwen2_moe,
    "qwen3moe": qwen3_moe,
    "gpt-oss": _gpt_oss,
    "glm4moe": _glm4_moe,
    "minimax-m2": minimax_m2,
    "minimax-m3": minimax_m3,
    "ernie4_5-moe": _ernie4_5_moe,
    "hunyuan-moe": hunyuan_moe,
    "hy_v3": hy_v3,
    "olmoe": _olmoe,
    "granitemoe": _granitemoe,
    "deepseek2": _deepseek2,
    "mistral3": mistral3,
    "mistral4": _deepseek2,
    "deepseek32": _indexed,
    "deepseek4": deepseek4,
    "glm-dsa": _indexed,
    **dict.fromkeys(GLM5_NEXT, glm5_next),
    "gemma3": gemma3,
    "gemma4": gemma4,
    "phi3": phi3,
    "phimoe": _phimoe,
    "lfm2": lfm2,
    "lfm2moe": lfm2_moe,
    "qwen3next": qwen3_next,
    "qwen35": qwen3_5,
    "qwen35moe": qwen3_5_moe,
    "kimi-linear": kimi_linear,
    "bailingmoe3": bailingmoe3,
    "bailingmoe2": _bailingmoe2,
    "smollm3": smollm3,
    "seed_oss": seed_oss,
    "dots1": _dots1,
    "glm4": glm4,
    "olmo2": olmo2,
    "exaone4": exaone4,
    "exaone-moe": _exaone_moe,
    "granite": granite,
    "granitehybrid": granite_hybrid,
    "nemotron_h": nemotron_h,
    "nemotron_h_moe": nemotron_h,
    "ernie4_5": ernie4_5,
    "hunyuan-dense": hunyuan_dense,
    "chatglm": chatglm,
    "afmoe": afmoe,
    "laguna": laguna,
    "mellum": mellum,
    "gemma2": gemma2,
    "command-r": command_r,
    "cohere2": cohere2,
    "mimo2": mimo2,
    "step35": step35,
}
