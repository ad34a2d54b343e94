"""What the metadata and tensors of a GGUF file say that several families read alike."""

from __future__ import annotations

from hybrid.models.decoder import MAX_LAYERS
from hybrid.weights.checkpoints.gguf_architectures import KIMI_DELTA, NEMOTRON
from hybrid.weights.checkpoints.gguf_files import Gguf
from hybrid.weights.checkpoints.gguf_metadata import GgufMetadata
from hybrid.weights.checkpoints.gguf_rope import Config

SOFTMAX, SIGMOID, ROOT_SOFTPLUS = 1, 2, 4  # values of expert_gating_func
MIXED = ("lfm2", "lfm2moe", "granitehybrid", *KIMI_DELTA, *NEMOTRON)  # whose layers do not all attend
_GATING = {SOFTMAX: "softmax", SIGMOID: "sigmoid", ROOT_SOFTPLUS: "root of softplus"}


def block_count(metadata: GgufMetadata) -> int:
    """Layers that lists of a file have an item for: those that predict more than the next token among them."""
    return metadata.size("block_count", maximum=MAX_LAYERS)


def layer_count(metadata: GgufMetadata) -> int:
    """Layers that predict more than the next token come last, and are not used. Files of DeepSeek-V4 may tell of such
    layers without having them.
    """
    blocks, further = block_count(metadata), metadata.size("nextn_predict_layers", 0)
    if metadata.architecture == "deepseek4" and not metadata.has_tensors(f"blk.{blocks - further}.nextn."):
        return blocks
    return blocks - further


def query_heads(metadata: GgufMetadata) -> list[int]:
    """Of every layer; of all models but Laguna and Step-3.5, as many in each."""
    name, count = "attention.head_count", max(1, layer_count(metadata))
    if metadata.architecture in ("laguna", "step35"):
        return metadata.layer_sizes(name, max(1, block_count(metadata)))[:count]
    return [metadata.size(name)] * count


def key_length(metadata: GgufMetadata) -> int:
    """Dimensions of a key, by default a head's part of the hidden size."""
    shared = metadata.size("embedding_length") // max(1, query_heads(metadata)[0])
    return metadata.size("attention.key_length", shared)


def kv_heads(metadata: GgufMetadata) -> list[int]:
    """Of every layer, 0 of those that do not attend in models of several mixers. Gemma 4 and MiMo tell it."""
    name, heads = "attention.head_count_kv", query_heads(metadata)[0]
    if metadata.architecture in ("gemma4", "mimo2"):
        return [heads]
    if metadata.architecture not in MIXED:
        return [metadata.size(name, heads)] * max(1, layer_count(metadata))
    found = metadata.layer_sizes(name, block_count(metadata))[: layer_count(metadata)]
    if len({*found} - {0}) != 1:
        raise metadata.refuse(name, found, "one number above 0, and 0 where a layer does not attend")
    return found


def has(model: Gguf, name: str, layer: int = 0) -> bool:
    """Whether a layer has this tensor."""
    return f"blk.{layer}.{name}" in model.tensors


def require_gating(metadata: GgufMetadata, default: int, allowed: int) -> None:
    """Raise unless experts are weighed as the family does."""
    found = metadata.size("expert_gating_func", default) or default
    if found != allowed:
        raise metadata.refuse("expert_gating_func", found, f"{allowed} ({_GATING[allowed]})")


def require_weights(metadata: GgufMetadata, *, norm: bool, scale: float = 1.0) -> None:
    """Raise unless the weights of experts are renormalised and scaled as the family always does."""
    if metadata.flag("expert_weights_norm", norm) != norm:
        raise metadata.refuse("expert_weights_norm", not norm, str(norm).lower())
    if metadata.number("expert_weights_scale", 0.0) not in (0.0, scale):
        raise metadata.refuse("expert_weights_scale", metadata.number("expert_weights_scale"), f"{scale:g} or absent")


def routed(metadata: GgufMetadata) -> Config:
    """How many experts there are and how many a token takes, as most families name it."""
    return {"num_experts": metadata.size("expert_count"), "num_experts_per_tok": metadata.size("expert_used_count")}
