"""Write a Hugging Face checkpoint with the layer shapes and formats of a published model and random weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import typer

from hybrid.errors import HybridError
from hybrid.files import atomic_file, write_json
from hybrid.formats.fp8 import SQUARE
from hybrid.models import model_spec
from hybrid.weights.checkpoints.files import INDEX
from hybrid.weights.shard import gap, make_header

SHARD_BYTES = 4_000_000_000
STD = 0.02  # keeps activations of a normalised model in a range where bf16 is at home
EXPONENTS = (118, 121)  # of mxfp4: random codes have a root mean square of 2.9, 0.009 times that is about STD
FP8_SCALE = 2.0**-12  # of e4m3: that of random codes is 100

_COMMON = {"hidden_act": "silu", "torch_dtype": "bfloat16", "use_cache": True, "attention_dropout": 0.0}
_QWEN3 = {
    **_COMMON, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": None, "attention_bias": False, "use_sliding_window": False,
    "sliding_window": None,
    "head_dim": 128, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip

_QWEN3_30B_A3B = {
    **_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48,
    "tie_word_embeddings": False,
}  # fmt: skip

_DEEPSEEK = {
    **_COMMON, "rms_norm_eps": 1e-6, "rope_theta": 10000, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_layer_freq": 1, "attention_bias": False,
    "tie_word_embeddings": False, "max_position_embeddings": 163840,
}  # fmt: skip
_DEEPSEEK_YARN = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096,
}  # fmt: skip

# As published, except for `num_hidden_layers`, which --layers replaces, and lists with an entry for every layer.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "qwen3-30b-a3b-fp8": {
        **_QWEN3_30B_A3B, "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [SQUARE, SQUARE], "modules_to_not_convert": ["lm_head"],
        },
    },
    "gpt-oss-20b": {
        **_COMMON, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "experts_per_token": 4, "attention_bias": True, "sliding_window": 128, "swiglu_limit": 7.0,
        "max_position_embeddings": 131072, "initial_context_length": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 150000, "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "tie_word_embeddings": False, "pad_token_id": 199999, "eos_token_id": 200002,
    },
    "deepseek-v2-lite": {
        **_DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "topk_method": "greedy",
        "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "scoring_func": "softmax", "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek-r1": {
        **_DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "topk_method": "noaux_tc",
        "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "num_nextn_predict_layers": 1, "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [SQUARE, SQUARE],
        },
    },
    "deepseek-v4-flash": {
        **_COMMON, "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 129280,
        "hidden_size": 4096, "moe_intermediate_size": 2048, "num_hidden_layers": 43, "num_attention_heads": 64,
        "num_key_value_heads": 1, "head_dim": 512, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "o_groups": 8,
        "o_lora_rank": 1024, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6,
        "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "sliding_window": 128,
        "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0], "compress_rope_theta": 160000, "rope_theta": 10000,
        "num_hash_layers": 3, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
        "rope_scaling": {**_DEEPSEEK_YARN, "factor": 16, "original_max_position_embeddings": 65536},
        "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "swiglu_limit": 10.0,
        "norm_topk_prob": True, "max_position_embeddings": 1048576, "tie_word_embeddings": False,
    },
    "qwen3-next-80b-a3b": {
        **_COMMON, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "vocab_size": 151936,
        "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "partial_rotary_factor": 0.25, "num_experts": 512,
        "num_experts_per_tok": 10, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "rope_theta": 1e7, "rope_scaling": None,
        "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "kimi-linear-48b-a3b": {
        **_COMMON, "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "vocab_size": 163840,
        "hidden_size": 2304, "intermediate_size": 9216, "moe_intermediate_size": 1024, "num_hidden_layers": 27,
        "num_attention_heads": 32, "num_key_value_heads": 32, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_experts": 256,
        "num_experts_per_token": 8, "num_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.446,
        "linear_attn_config": {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
        "rms_norm_eps": 1e-5, "model_max_length": 1048576, "tie_word_embeddings": False,
        "bos_token_id": 163584, "eos_token_id": 163586,
    },
    "glm-4.5-air": {
        **_COMMON, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "vocab_size": 151552,
        "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "partial_rotary_factor": 0.5,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": False,
        "attention_bias": True, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "rope_scaling": None, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    },
    "qwen3.5-35b-a3b": {  # its text part
        **_COMMON, "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
        "vocab_size": 248320, "hidden_size": 2048, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_hidden_layers": 40, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "num_experts": 256, "num_experts_per_tok": 8,
        "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    },
    "qwen3.8-flash-next": {  # its text part
        **_COMMON, "architectures": ["Qwen4ExpForCausalLM"], "model_type": "qwen4_exp_text", "vocab_size": 248320,
        "hidden_size": 2560, "moe_intermediate_size": 640, "shared_expert_intermediate_size": 640,
        "num_hidden_layers": 48, "num_attention_heads": 24, "num_key_value_heads": 2, "head_dim": 256,
        "num_experts": 512, "num_experts_per_tok": 10, "norm_topk_prob": True, "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 48, "output_gate_type": "sigmoid", "hc_count": 4,
        "hc_lowrank": 320, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128,
        "indexer_budget": 2048, "indexer_compress_ratio": 4, "ngram_size": 3, "heads_per_ngram": 8,
        "ple_embed_dim": 2560, "ple_conv_kernel_size": 4, "ple_layer_ids": [2], "ngram_vocab_size_base": 20000000,
        "make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 128, "seed": 1234, "eos_token_id": 248046,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    },
    "phi-3.5-moe": {  # but for its two lists of divisors
        **_COMMON, "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "vocab_size": 32064,
        "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True,
        "lm_head_bias": True, "router_jitter_noise": 0.01, "input_jitter_noise": 0.01, "sliding_window": 131072,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 64, "long_factor": [32.0] * 64,
            "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 32000,
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

# What is changed of a model to measure its layers: so few that a store takes some GB, and a head that does not hide
# them. Experts that are left out are none that a token reads.
SLICES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"num_hidden_layers": 4},
    "gpt-oss-20b": {"num_hidden_layers": 4},
    "deepseek-v2-lite": {"num_hidden_layers": 4},
    "deepseek-r1": {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 64},
    "deepseek-v4-flash": {  # of every kind of layer, those with entries of 4 tokens twice
        "num_hidden_layers": 4,
        "n_routed_experts": 32,
        "compress_ratios": [0, 4, 128, 4],
        "num_hash_layers": 0,
    },
    "qwen3-next-80b-a3b": {"num_hidden_layers": 4, "num_experts": 128},
    "glm-4.5-air": {"num_hidden_layers": 3, "n_routed_experts": 64},
    "qwen3.5-35b-a3b": {"num_hidden_layers": 4, "num_experts": 128},
    "qwen3.8-flash-next": {  # a table of which as many rows are read
        "num_hidden_layers": 4,
        "num_experts": 128,
        "ngram_vocab_size_base": 100000,
        "eos_token_id": 1,
    },
    "kimi-linear-48b-a3b": {
        "num_hidden_layers": 4,
        "num_experts": 64,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
    },
    "phi-3.5-moe": {"num_hidden_layers": 2},
}
SLICE_VOCABULARY = 16384

_BYTES = {"BF16": 2, "F8_E4M3": 1, "U8": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; `dtype` as safetensors calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _BYTES[self.dtype] * int(np.prod(self.shape))


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


def make_slice(like: str) -> dict[str, Any]:
    """The config.json of some layers of a model in `SLICES`."""
    if like not in SLICES:
        raise typer.BadParameter(f"{like!r} has no slice; known: {', '.join(SLICES)}")
    return {**make_config(like), "vocab_size": SLICE_VOCABULARY, **SLICES[like]}


def write_checkpoint(out: Path, config: dict[str, Any], seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Stream the weights to `out` shard by shard; needs some MB of memory."""
    out.mkdir(parents=True, exist_ok=True)
    shards = _shards(list(published_tensors(config)), shard_bytes)
    source = RandomWeights(seed)
    weight_map = {}
    for index, tensors in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({tensor.name: file for tensor in tensors})
        _write_shard(out / file, tensors, source)
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(out / "config.json", config)


def published_tensors(config: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a published checkpoint: bf16, or with what its quantization_config says in mxfp4 or fp8."""
    spec, method = model_spec(config), config.get("quantization_config", {}).get("quant_method")
    for name, shape in spec.checkpoint_shapes("mxfp4" if method == "mxfp4" else "apart"):
        if method == "mxfp4" and name.endswith(("_blocks", "_scales")):
            yield Tensor(name, "U8", shape)
        elif method == "fp8" and name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            yield Tensor(name, "F8_E4M3", shape)
            yield Tensor(f"{name}_scale_inv", "BF16", tuple(-(-size // SQUARE) for size in shape))
        else:
            yield Tensor(name, "BF16", shape)


class RandomWeights:
    """Random tensors cut out of blocks at random places: as fast as the disk, and no two alike."""

    def __init__(self, seed: int, block: int = 1 << 22) -> None:
        self._random, self._block = np.random.default_rng(seed), block
        values = self._random.standard_normal(2 * block, np.float32) * STD
        self._values: npt.NDArray[Any] = values.astype(ml_dtypes.bfloat16)
        self._codes = self._random.integers(0, 256, 2 * block, np.uint8)
        # a NaN of e4m3 has all bits set but the sign
        self._e4m3 = np.where(self._codes & 0x7F == 0x7F, 0, self._codes).astype(np.uint8)
        self._exponents = self._random.integers(*EXPONENTS, 2 * block, np.uint8, endpoint=True)

    def chunks(self, tensor: Tensor) -> Iterator[npt.NDArray[Any]]:
        """The tensor's values, flat, in pieces. Norms are ones, scales of fp8 all the same."""
        size = int(np.prod(tensor.shape))
        if tensor.name.endswith(("norm.weight", "_scale_inv")):
            yield np.full(size, FP8_SCALE if tensor.name.endswith("_inv") else 1, ml_dtypes.bfloat16)
            return
        values = self._of_kind(tensor)
        for start in range(0, size, self._block):
            offset = int(self._random.integers(self._block))
            yield values[offset : offset + min(self._block, size - start)]

    def _of_kind(self, tensor: Tensor) -> npt.NDArray[Any]:
        if tensor.dtype == "U8":
            return self._exponents if tensor.name.endswith("_scales") else self._codes
        return self._e4m3 if tensor.dtype == "F8_E4M3" else self._values


def _shards(tensors: list[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Tensors in order, in groups of about `shard_bytes`."""
    starts = np.cumsum([0] + [tensor.nbytes for tensor in tensors[:-1]])
    groups = groupby(zip(starts, tensors, strict=True), key=lambda item: item[0] // shard_bytes)
    return [[tensor for _, tensor in group] for _, group in groups]


def _write_shard(path: Path, tensors: list[Tensor], source: RandomWeights) -> None:
    with atomic_file(path) as file:
        file.write(make_header((tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors))
        for tensor in tensors:
            for chunk in source.chunks(tensor):
                file.write(chunk.view(np.uint8).data)
            file.write(bytes(gap(tensor.nbytes)))


if __name__ == "__main__":
    typer.run(main)
