"""Dense models in GGUF files of whose configuration more must be said than what all have."""

from __future__ import annotations

from hybrid.weights.checkpoints.gguf_fields import has, key_length, layer_count
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config, growing, rope_scaling


def seed_oss(model: Gguf, metadata: GgufMetadata) -> Config:
    biases = {"attention_out_bias": has(model, "attn_output.bias"), "mlp_bias": has(model, "ffn_gate.bias")}
    return {"model_type": "seed_oss", **biases}


def smollm3(model: Gguf, metadata: GgufMetadata) -> Config:
    """Every fourth layer is without rope, whatever its config.json said."""
    return {"model_type": "smollm3", "no_rope_layer_interval": 4, "mlp_bias": has(model, "ffn_gate.bias")}


def phi3(model: Gguf, metadata: GgufMetadata) -> Config:
    return {"model_type": "phi3", "sliding_window": metadata.size("attention.sliding_window", 0) or None}


def mistral3(model: Gguf, metadata: GgufMetadata) -> Config:
    """Ministral 3; Mistral Small 3.1 and 3.2 are it with plain rope."""
    scaling = rope_scaling(model, metadata)
    if scaling and (whole := metadata.number("rope.scaling.yarn_log_multiplier", 0.0)):
        scaling |= {"mscale": 1.0, "mscale_all_dim": whole}
    return {"model_type": "ministral3", "rope_scaling": growing(metadata, scaling)}


def glm4(model: Gguf, metadata: GgufMetadata) -> Config:
    return {
        "model_type": "glm4",
        "partial_rotary_factor": metadata.size("rope.dimension_count") / metadata.size("attention.key_length"),
    }


def chatglm(model: Gguf, metadata: GgufMetadata) -> Config:
    turning = metadata.size("rope.dimension_count")
    return {"model_type": "glm", "partial_rotary_factor": turning / key_length(metadata)}


def granite(model: Gguf, metadata: GgufMetadata) -> Config:
    return {
        "model_type": "granite",
        "mlp_bias": has(model, "ffn_gate.bias"),
        "attention_multiplier": metadata.number("attention.scale", 0.0) or key_length(metadata) ** -0.5,
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale"),
    }


def ernie4_5(model: Gguf, metadata: GgufMetadata) -> Config:
    return {"model_type": "ernie4_5", "use_bias": has(model, "attn_q.bias")}


def hunyuan_dense(model: Gguf, metadata: GgufMetadata) -> Config:
    """The base of rope is as the model stretches it."""
    return {"model_type": "hunyuan_v1_dense"}


def olmo2(model: Gguf, metadata: GgufMetadata) -> Config:
    window = metadata.size("attention.sliding_window", 0)
    if not window:
        return {"model_type": "olmo2"}
    return {"model_type": "olmo3", "sliding_window": window, "layer_types": _slides(metadata)}


def exaone4(model: Gguf, metadata: GgufMetadata) -> Config:
    window = metadata.size("attention.sliding_window", 0) or None
    return {"model_type": "exaone4", "sliding_window": window, "layer_types": _slides(metadata) if window else None}


def command_r(model: Gguf, metadata: GgufMetadata) -> Config:
    return {"model_type": "cohere", "use_qk_norm": has(model, "attn_q_norm.weight"), **_cohere(metadata)}


def cohere2(model: Gguf, metadata: GgufMetadata) -> Config:
    """Every fourth layer sees everything."""
    window = metadata.size("attention.sliding_window", 0) or None
    return {"model_type": "cohere2", "sliding_window": window, **_cohere(metadata)}


def _cohere(metadata: GgufMetadata) -> Config:
    return {
        "layer_norm_eps": metadata.number("attention.layer_norm_epsilon"),
        "logit_scale": metadata.number("logit_scale"),
    }


def _slides(metadata: GgufMetadata) -> list[str]:
    """Which layers have a window: as the file says, or all but every fourth."""
    name, count = "attention.sliding_window_pattern", layer_count(metadata)
    every_fourth = [(layer + 1) % 4 > 0 for layer in range(count)]
    slides = metadata.layer_flags(name, count) if metadata.has(name) else every_fourth
    return ["sliding_attention" if one else "full_attention" for one in slides]
