"""Write a Hugging Face checkpoint with the layer shapes of a published model and random bf16 weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import typer

from hybrid.errors import HybridError
from hybrid.models import model_spec
from hybrid.weights.checkpoint import INDEX, tensor_shapes
from hybrid.weights.files import atomic_file, write_json
from hybrid.weights.shard import gap, make_header

SHARD_BYTES = 4_000_000_000
STD = 0.02  # keeps activations of a normalised model in a range where bf16 is at home

_COMMON = {"hidden_act": "silu", "torch_dtype": "bfloat16", "use_cache": True, "attention_dropout": 0.0}
_QWEN3 = {
    **_COMMON, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": None, "attention_bias": False, "use_sliding_window": False,
    "sliding_window": None,
    "head_dim": 128, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip

# As published, except for `num_hidden_layers`, which --layers replaces.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        **_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_QWEN3, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "max_window_layers": 28, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "mixtral-8x7b": {
        **_COMMON, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip

Tensor = tuple[str, tuple[int, ...]]


def main(
    out: Annotated[Path, typer.Argument(help="Directory to write, new or empty.")],
    like: Annotated[str, typer.Option(help=f"Model whose shapes to take: {', '.join(CONFIGS)}.")],
    family: Annotated[str | None, typer.Option(help="Its model_type; checked when given.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers to write; default: all of them.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
) -> None:
    """Write a synthetic checkpoint: config.json and sharded safetensors, without a tokenizer."""
    try:
        write_checkpoint(out, make_config(like, family, layers), seed)
    except HybridError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def make_config(like: str, family: str | None = None, layers: int | None = None) -> dict[str, Any]:
    """The published config.json of a model in `CONFIGS`, with another number of layers."""
    if like not in CONFIGS:
        raise typer.BadParameter(f"{like!r} is unknown; known: {', '.join(CONFIGS)}")
    config = dict(CONFIGS[like])
    if family not in (None, config["model_type"]):
        raise typer.BadParameter(f"{like} is of family {config['model_type']}, not {family}")
    return {**config, "num_hidden_layers": layers or config["num_hidden_layers"]}


def write_checkpoint(out: Path, config: dict[str, Any], seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Stream the weights to `out` shard by shard; needs some MB of memory."""
    out.mkdir(parents=True, exist_ok=True)
    shards = _shards(list(tensor_shapes(model_spec(config))), shard_bytes)
    source = RandomWeights(seed)
    weight_map = {}
    for index, tensors in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({name: file for name, _ in tensors})
        _write_shard(out / file, tensors, source)
    total = sum(_nbytes(shape) for tensors in shards for _, shape in tensors)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(out / "config.json", config)


class RandomWeights:
    """Random bf16 tensors cut out of one block at random places: as fast as the disk, and no two alike."""

    def __init__(self, seed: int, block: int = 1 << 22) -> None:
        self._random = np.random.default_rng(seed)
        values = self._random.standard_normal(2 * block, np.float32) * STD
        self._values: npt.NDArray[Any] = values.astype(ml_dtypes.bfloat16)
        self._block = block

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[Any]]:
        """The tensor's values, flat, in pieces. Norms are ones."""
        size = int(np.prod(shape))
        if len(shape) == 1:
            yield np.ones(size, ml_dtypes.bfloat16)
            return
        for start in range(0, size, self._block):
            offset = int(self._random.integers(self._block))
            yield self._values[offset : offset + min(self._block, size - start)]


def _shards(tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Tensors in order, in groups of about `shard_bytes`."""
    starts = np.cumsum([0] + [_nbytes(shape) for _, shape in tensors[:-1]])
    groups = groupby(zip(starts, tensors, strict=True), key=lambda item: item[0] // shard_bytes)
    return [[tensor for _, tensor in group] for _, group in groups]


def _write_shard(path: Path, tensors: list[Tensor], source: RandomWeights) -> None:
    with atomic_file(path) as file:
        file.write(make_header((name, "BF16", shape, _nbytes(shape)) for name, shape in tensors))
        for name, shape in tensors:
            for chunk in source.chunks(name, shape):
                file.write(chunk.view(np.uint8).data)
            file.write(bytes(gap(_nbytes(shape))))


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


if __name__ == "__main__":
    typer.run(main)
