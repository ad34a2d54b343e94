"""Writes a GGUF file with the layer shapes and types of a published one and random blocks, of families that
`bench/gguf_file.py` cannot write from a checkpoint.

Blocks are random bytes with scales that keep weights at a standard deviation of 0.02; a router chooses experts as if
by lot. So times are those of the published file, texts are not. llama.cpp and ik_llama.cpp read the very same file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from comparison import Progress
from gguf import GGMLQuantizationType as Type
from gguf_file import F32, Outline, write_whole
from synthetic_checkpoint import EXPONENTS, STD

POOL = 1 << 16  # random blocks of each type that pieces are cut out of
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}  # where rows are no whole blocks of 256, as llama.cpp does

Config = Mapping[str, Any]  # of a config.json
Tensors = Iterator[tuple[str, tuple[int, ...]]]


def write_synthetic(path: Path, config: Config, progress: Progress | None = None) -> None:
    """Write the whole file or nothing, holding one tensor at a time. Raises CapacityError for a full disk."""
    architecture, tensors, metadata, types = FAMILIES[config["model_type"]]
    outlines = [Outline(name, shape, _type(name, shape, types)) for name, shape in tensors(config)]
    blocks = RandomBlocks(seed=0)

    def describe(writer: gguf.GGUFWriter) -> None:
        for key, value in {**_common(config), **metadata(config)}.items():
            _ADD[type(value)](writer, f"{architecture}.{key}", value)
        writer.add_tokenizer_model("no_vocab")

    write_whole(path, architecture, describe, outlines, blocks.data, progress)


def _type(name: str, shape: tuple[int, ...], types: Mapping[str, Type]) -> Type:
    """The first of the types whose pattern the name has; F32 for what has none, and for rows of one dimension."""
    if len(shape) == 1 or name.endswith(".bias"):
        return F32
    found = next((type_ for pattern, type_ in types.items() if re.search(pattern, name)), F32)
    return found if shape[-1] % gguf.GGML_QUANT_SIZES[found][0] == 0 else FALLBACKS[found]


class RandomBlocks:
    """Bytes of tensors, cut out of random blocks at random places: as fast as the disk, and no two alike."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pools: dict[Type, npt.NDArray[np.uint8]] = {}

    def data(self, tensor: Outline) -> npt.NDArray[np.uint8]:
        """The tensor as the file holds it, flat. Norms are ones."""
        if tensor.type == F32:
            return self._floats(tensor).view(np.uint8)
        if tensor.type not in self._pools:
            self._pools[tensor.type] = self._pool(tensor.type)
        pool, left, parts = self._pools[tensor.type], tensor.nbytes // gguf.GGML_QUANT_SIZES[tensor.type][1], []
        while left:
            start = int(self._random.integers(POOL // 2))
            parts.append(pool[start : start + min(left, POOL // 2)].reshape(-1))
            left -= min(left, POOL // 2)
        return np.concatenate(parts)

    def _floats(self, tensor: Outline) -> npt.NDArray[np.float32]:
        count = int(np.prod(tensor.shape))
        if "norm" in tensor.name:
            return np.ones(count, np.float32)
        return STD * self._random.standard_normal(count, np.float32)

    def _pool(self, type_: Type) -> npt.NDArray[np.uint8]:
        blocks = self._random.integers(0, 256, (POOL, gguf.GGML_QUANT_SIZES[type_][1]), np.uint8)
        if type_ == Type.Q8_0:  # no file has -128, which ik_llama.cpp's products cannot negate
            blocks[blocks == 128] = 129
        if type_ == Type.MXFP4:
            blocks[:, 0] = self._random.integers(*EXPONENTS, POOL, np.uint8, endpoint=True)
        for at, deviation in _FACTORS.get(type_, {}).items():
            blocks[:, at : at + 2] = np.frombuffer(np.float16(STD / deviation).tobytes(), np.uint8)
        return blocks


# Where blocks have fp16 factors, and the deviation of what random codes (and scales) are without them. The minima of
# Q4_K are 7.5 times its scales: that is the mean of its codes.
_FACTORS: dict[Type, dict[int, float]] = {
    Type.Q8_0: {0: 74},
    Type.Q5_0: {0: 9.2},
    Type.Q4_K: {0: 258, 2: 258 / 7.5},
    Type.Q6_K: {208: 1370},
}
_ADD = {
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    bool: gguf.GGUFWriter.add_bool,
    str: gguf.GGUFWriter.add_string,
}


def _common(config: Config) -> dict[str, Any]:
    yarn = config["rope_scaling"]
    return {
        "vocab_size": config["vocab_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "expert_used_count": config["num_experts_per_tok"],
        "rope.freq_base": float(config["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn["factor"]),
        "rope.scaling.original_context_length": yarn["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(yarn["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(yarn["beta_slow"]),
    }


def _outer(config: Config) -> Tensors:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "token_embd.weight", (vocab, hidden)
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (vocab, hidden)


def _gpt_oss_metadata(config: Config) -> dict[str, Any]:
    return {
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "rope.dimension_count": config["head_dim"],
        "expert_count": config["num_local_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


def _gpt_oss(config: Config) -> Tensors:
    hidden, wide, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], kv_heads * config["head_dim"]
    matrices = {
        "attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden),
        "attn_output": (hidden, queries), "ffn_gate_inp": (experts, hidden), "ffn_gate_exps": (experts, wide, hidden),
        "ffn_up_exps": (experts, wide, hidden), "ffn_down_exps": (experts, hidden, wide),
    }  # fmt: skip
    yield from _outer(config)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in matrices.items():
            yield f"blk.{layer}.{name}.weight", shape
            yield f"blk.{layer}.{name}.bias", shape[:-1]
        yield f"blk.{layer}.attn_sinks.weight", (heads,)
        yield f"blk.{layer}.attn_norm.weight", (hidden,)
        yield f"blk.{layer}.post_attention_norm.weight", (hidden,)


def _deepseek2_metadata(config: Config) -> dict[str, Any]:
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": turned,
        "rope.scaling.yarn_log_multiplier": 0.1 * config["rope_scaling"]["mscale_all_dim"],
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_gating_func": 1,
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "leading_dense_block_count": config["first_k_dense_replace"],
    }


def _deepseek2(config: Config) -> Tensors:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, turned, values = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    attention = {
        "attn_norm": (hidden,), "attn_q": (heads * (nope + turned), hidden), "attn_kv_a_mqa": (rank + turned, hidden),
        "attn_kv_a_norm": (rank,), "attn_k_b": (heads, rank, nope), "attn_v_b": (heads, values, rank),
        "attn_output": (hidden, heads * values), "ffn_norm": (hidden,),
    }  # fmt: skip
    yield from _outer(config)
    for layer in range(config["num_hidden_layers"]):
        ffn = _dense(config) if layer < config["first_k_dense_replace"] else _routed(config)
        for name, shape in (attention | ffn).items():
            yield f"blk.{layer}.{name}.weight", shape


def _dense(config: Config, wide: int | None = None, ending: str = "") -> dict[str, tuple[int, ...]]:
    hidden, wide = config["hidden_size"], wide or config["intermediate_size"]
    return {
        f"ffn_gate{ending}": (wide, hidden), f"ffn_up{ending}": (wide, hidden), f"ffn_down{ending}": (hidden, wide),
    }  # fmt: skip


def _routed(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, wide, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    return {
        "ffn_gate_inp": (experts, hidden), "ffn_gate_exps": (experts, wide, hidden),
        "ffn_up_exps": (experts, wide, hidden), "ffn_down_exps": (experts, hidden, wide),
        **_dense(config, config["n_shared_experts"] * wide, "_shexp"),
    }  # fmt: skip


# Of gpt-oss the file that its authors point to; of DeepSeek what llama.cpp calls Q4_K_M, with every down projection in
# the finer of its two types' fallbacks for rows that are no whole blocks.
_GPT_OSS_TYPES = {"exps": Type.MXFP4, "attn_|token_embd|output": Type.Q8_0}
_DEEPSEEK2_TYPES = {"inp": F32, "^output|down": Type.Q6_K, ".": Type.Q4_K}
FAMILIES: dict[str, tuple[str, Callable[[Config], Tensors], Callable[[Config], dict[str, Any]], dict[str, Type]]] = {
    "gpt_oss": ("gpt-oss", _gpt_oss, _gpt_oss_metadata, _GPT_OSS_TYPES),
    "deepseek_v2": ("deepseek2", _deepseek2, _deepseek2_metadata, _DEEPSEEK2_TYPES),
}
