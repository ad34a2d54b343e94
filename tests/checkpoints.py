"""Small random checkpoints of every family, with odd sizes: written with numpy alone, or by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hybrid.models import model_spec
from hybrid.weights.checkpoint import Checkpoint, tensor_shapes
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
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
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
}
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}


def random_tensors(
    config: dict[str, Any], dtype: str = "bf16", fused: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name: matrices of spread 0.1, norms around 1."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(model_spec(config), fused):
        centre = 1.0 if "norm" in name else 0.0
        tensors[name] = (centre + 0.1 * random.standard_normal(shape)).astype(DTYPES[dtype])
    return tensors


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
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**CONFIGS[family], **changes}
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "torch_dtype": "float32"}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + ("norm" in name))
    model = model.to(torch_dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=not fused)
    return model


def packed(source: Path) -> Store:
    """The store of a checkpoint, packed beside it and checked."""
    store = source.with_name(f"{source.name}-store")
    pack(Checkpoint.open(source), store)
    return Store.open(store, check=True)


def flip_bit(path: Path, position: int) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
