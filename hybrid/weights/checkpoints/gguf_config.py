"""A GGUF file's metadata as the config.json that its model had: what the families read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hybrid.errors import WeightsError
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.shard import read_bytes

Config = dict[str, Any]

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func
_GATING = {_SOFTMAX: "softmax", _SIGMOID: "sigmoid"}
_NULLS = ("q_lora_rank",)  # fields in which null says something
_TOO_LARGE = 1 << 20  # bytes of factors of a rope


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


def layer_count(metadata: GgufMetadata) -> int:
    """Layers that predict more than the next token come last, and are not used."""
    return metadata.size("block_count") - metadata.size("nextn_predict_layers", 0)


def _common(model: Gguf, metadata: GgufMetadata) -> Config:
    heads, dim = metadata.size("attention.head_count"), _key_length(metadata)
    if metadata.architecture != "deepseek2" and metadata.size("attention.value_length", dim) != dim:
        raise metadata.refuse("attention.value_length", metadata.size("attention.value_length"), f"{dim}, as of keys")
    if EMBEDDING not in model.tensors:
        raise WeightsError(f"{model.path}: tensor {EMBEDDING} is missing: fetch all files of the model again")
    return {
        "num_hidden_layers": layer_count(metadata),
        "hidden_size": metadata.size("embedding_length"),
        "vocab_size": model.tensors[EMBEDDING].shape[0],
        "max_position_embeddings": metadata.size("context_length"),
        "intermediate_size": metadata.size("feed_forward_length", 0) or None,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": dim,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(model, metadata),
        "partial_rotary_factor": _rope_part(metadata, dim),
        "tie_word_embeddings": HEAD not in model.tensors,
        "attention_bias": _has(model, "attn_q.bias") or _has(model, "attn_qkv.bias"),
    }


def _key_length(metadata: GgufMetadata) -> int:
    shared = metadata.size("embedding_length") // max(1, metadata.size("attention.head_count"))
    return metadata.size("attention.key_length", shared)


def _rope_part(metadata: GgufMetadata, dim: int) -> float | None:
    turning = metadata.size("rope.dimension_count", dim)
    return None if turning == dim or not dim else turning / dim


def _rope_scaling(model: Gguf, metadata: GgufMetadata) -> Config | None:
    if factors := _factors(model, ROPE_FACTORS):
        return {"rope_type": "factors", "factors": factors}
    linear = metadata.number("rope.scale_linear", 1.0)  # of old files
    factor = metadata.number("rope.scaling.factor", linear)
    kind = metadata.text("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(metadata, factor)
    raise metadata.refuse("rope.scaling.type", kind, "none, linear or yarn")


def _yarn(metadata: GgufMetadata, factor: float) -> Config:
    names = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    found = {ours: metadata.number(f"rope.scaling.{name}") for name, ours in names.items() if _set(metadata, name)}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.size("rope.scaling.original_context_length"),
        **found,
    }


def _set(metadata: GgufMetadata, name: str) -> bool:
    return metadata.has(f"rope.scaling.{name}") and metadata.number(f"rope.scaling.{name}") > 0


def _factors(model: Gguf, name: str) -> list[float]:
    """The values of a small tensor of floats, [] where there is none."""
    entry = model.tensors.get(name)
    if entry is None:
        return []
    if entry.dtype != "F32" or len(entry.shape) != 1 or entry.end - entry.start > _TOO_LARGE:
        raise WeightsError(f"{model.path}: tensor {name} is {entry.dtype} {list(entry.shape)}; it must be a row of F32")
    return [float(value) for value in read_bytes(entry, 0, entry.end - entry.start).view(np.float32)]


def _has(model: Gguf, name: str, layer: int = 0) -> bool:
    return f"blk.{layer}.{name}" in model.tensors


def _gating(metadata: GgufMetadata, default: int, allowed: int) -> None:
    """Raise unless experts are weighed as the family does."""
    found = metadata.size("expert_gating_func", default) or default
    if found != allowed:
        raise metadata.refuse("expert_gating_func", found, f"{allowed} ({_GATING[allowed]})")


def _weights(metadata: GgufMetadata, *, norm: bool, scale: float = 1.0) -> None:
    """Raise unless the weights of experts are renormalised and scaled as the family always does."""
    if metadata.flag("expert_weights_norm", norm) != norm:
        raise metadata.refuse("expert_weights_norm", not norm, str(norm).lower())
    if metadata.number("expert_weights_scale", 0.0) not in (0.0, scale):
        raise metadata.refuse("expert_weights_scale", metadata.number("expert_weights_scale"), f"{scale:g} or absent")


def _experts(metadata: GgufMetadata) -> Config:
    return {"num_experts": metadata.size("expert_count"), "num_experts_per_tok": metadata.size("expert_used_count")}


def _llama(model: Gguf, metadata: GgufMetadata) -> Config:
    if not metadata.size("expert_count", 0):
        return {"model_type": "llama", "mlp_bias": _has(model, "ffn_gate.bias")}
    _gating(metadata, _SOFTMAX, _SOFTMAX)
    _weights(metadata, norm=True)
    return {"model_type": "mixtral", **_experts(metadata)}


def _qwen2(model: Gguf, metadata: GgufMetadata) -> Config:
    return {"model_type": "qwen2"}


def _qwen3(model: Gguf, metadata: GgufMetadata) -> Config:
    return {"model_type": "qwen3"}


def _expert_width(metadata: GgufMetadata) -> int:
    """Older files tell the width of all chosen experts together."""
    if metadata.has("expert_feed_forward_length"):
        return metadata.size("expert_feed_forward_length")
    return metadata.size("feed_forward_length") // max(1, metadata.size("expert_used_count"))


def _qwen2_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    _gating(metadata, _SOFTMAX, _SOFTMAX)
    _weights(metadata, norm=False)
    width = metadata.size("expert_shared_feed_forward_length", metadata.size("feed_forward_length", 0))
    return {
        "model_type": "qwen2_moe",
        **_experts(metadata),
        "moe_intermediate_size": _expert_width(metadata),
        "shared_expert_intermediate_size": width,
        "norm_topk_prob": False,
        "qkv_bias": _has(model, "attn_q.bias"),
    }


def _qwen3_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    _gating(metadata, _SOFTMAX, _SOFTMAX)
    _weights(metadata, norm=True)
    return {
        "model_type": "qwen3_moe",
        **_experts(metadata),
        "moe_intermediate_size": _expert_width(metadata),
        "norm_topk_prob": True,
    }


def _gpt_oss(model: Gguf, metadata: GgufMetadata) -> Config:
    """The published models turn with bounds of yarn that are not rounded."""
    scaling = _rope_scaling(model, metadata)
    return {
        "model_type": "gpt_oss",
        **_experts(metadata),
        "intermediate_size": metadata.size("expert_feed_forward_length"),
        "sliding_window": metadata.size("attention.sliding_window"),
        "rope_scaling": {**scaling, "truncate": False} if scaling else {"rope_type": "default"},
    }


def _glm4_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    _gating(metadata, _SIGMOID, _SIGMOID)
    first = metadata.size("leading_dense_block_count", 0)
    return {
        "model_type": "glm4_moe",
        "n_routed_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "n_shared_experts": metadata.size("expert_shared_count", 1),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "first_k_dense_replace": first,
        "norm_topk_prob": metadata.flag("expert_weights_norm", True),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 0.0) or 1.0,
        "n_group": metadata.size("expert_group_count", 0) or 1,
        "topk_group": metadata.size("expert_group_used_count", 0) or 1,
        "use_qk_norm": _has(model, "attn_q_norm.weight"),
        "partial_rotary_factor": metadata.size("rope.dimension_count") / metadata.size("attention.key_length"),
    }


def _minimax_m2(model: Gguf, metadata: GgufMetadata) -> Config:
    _gating(metadata, _SIGMOID, _SIGMOID)
    _weights(metadata, norm=True)
    return {
        "model_type": "minimax_m2",
        **_experts(metadata),
        "intermediate_size": metadata.size("expert_feed_forward_length"),
    }


def _ernie4_5_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    _gating(metadata, _SOFTMAX, _SOFTMAX)
    _weights(metadata, norm=True)
    return {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": metadata.size("expert_count"),
        "moe_k": metadata.size("expert_used_count"),
        "moe_layer_interval": metadata.size("interleave_moe_layer_step", 1),
        "moe_layer_start_index": metadata.size("leading_dense_block_count", 0),
        "moe_intermediate_size": metadata.size("expert_feed_forward_length"),
        "moe_num_shared_experts": metadata.size("expert_shared_count", 0),
    }


def _hunyuan_moe(model: Gguf, metadata: GgufMetadata) -> Config:
    _gating(metadata, _SOFTMAX, _SOFTMAX)
    _weights(metadata, norm=True)
    experts = metadata.size("expert_used_count")
    return {
        "model_type": "hunyuan_v1_moe",
        "num_experts": metadata.size("expert_count"),
        "moe_topk": experts,
        "intermediate_size": metadata.size("expert_feed_forward_length"),
    }


def _olmoe(model: Gguf, metadata: GgufMetadata) -> Config:
    _gating(metadata, _SOFTMAX, _SOFTMAX)
    _weights(metadata, norm=False)
    if metadata.number("attention.clamp_kqv", 0.0):
        raise metadata.refuse("attention.clamp_kqv", metadata.number("attention.clamp_kqv"), "absent or 0")
    return {"model_type": "olmoe", **_experts(metadata), "norm_topk_prob": False}


def _granitemoe(model: Gguf, metadata: GgufMetadata) -> Config:
    _gating(metadata, _SOFTMAX, _SOFTMAX)
    if metadata.size("expert_shared_feed_forward_length", 0):
        raise metadata.refuse(
            "expert_shared_feed_forward_length", metadata.size("expert_shared_feed_forward_length"), "absent"
        )
    return {
        "model_type": "granitemoe",
        "num_local_experts": metadata.size("expert_count"),
        "num_experts_per_tok": metadata.size("expert_used_count"),
        "attention_multiplier": metadata.number("attention.scale", 0.0) or _key_length(metadata) ** -0.5,
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale"),
    }


def _deepseek2(model: Gguf, metadata: GgufMetadata) -> Config:
    """In newer files lengths are those of latents; in older ones of keys and values."""
    last = layer_count(metadata) - 1
    sigmoid = metadata.size("expert_gating_func", 0) or (
        _SIGMOID if _has(model, "exp_probs_b.bias", last) else _SOFTMAX
    )
    turned = metadata.size("rope.dimension_count")
    keys = metadata.size("attention.key_length_mla", metadata.size("attention.key_length", 0))
    groups = metadata.size("expert_group_count", 0) or 1
    normed = metadata.flag("expert_weights_norm", False)
    found = {
        "model_type": "deepseek_v3" if sigmoid == _SIGMOID else "deepseek_v2",
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
        "rope_scaling": _latent_scaling(metadata, _rope_scaling(model, metadata)),
        "attention_bias": False,
    }
    return (
        found if sigmoid == _SIGMOID else {**found, "topk_method": "group_limited_greedy" if groups > 1 else "greedy"}
    )


def _latent_scaling(metadata: GgufMetadata, scaling: Config | None) -> Config | None:
    """What YaRN multiplies scores by, apart from the turned dimensions."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return scaling
    magnitude = metadata.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    return {**scaling, "mscale": magnitude, "mscale_all_dim": magnitude} if magnitude else scaling


_FAMILIES: dict[str, Callable[[Gguf, GgufMetadata], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "gpt-oss": _gpt_oss,
    "glm4moe": _glm4_moe,
    "minimax-m2": _minimax_m2,
    "ernie4_5-moe": _ernie4_5_moe,
    "hunyuan-moe": _hunyuan_moe,
    "olmoe": _olmoe,
    "granitemoe": _granitemoe,
    "deepseek2": _deepseek2,
}
MODEL_TYPES = {
    "llama": ("llama", "mixtral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "qwen2moe": ("qwen2_moe",),
    "qwen3moe": ("qwen3_moe",),
    "gpt-oss": ("gpt_oss",),
    "glm4moe": ("glm4_moe",),
    "minimax-m2": ("minimax_m2",),
    "ernie4_5-moe": ("ernie4_5_moe",),
    "hunyuan-moe": ("hunyuan_v1_moe",),
    "olmoe": ("olmoe",),
    "granitemoe": ("granitemoe",),
    "deepseek2": ("deepseek_v2", "deepseek_v3"),
}  # that the functions above make of files of each architecture
