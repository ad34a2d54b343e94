"""GGUF files for tests, written with numpy alone: any metadata and tensors, and models as llama.cpp lays them out."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hybrid.files.gguf_types import TYPES

NUMBERS = {found.name: number for number, found in TYPES.items()}
ALIGNMENT = 32
ARCHITECTURES = {
    "llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "glm4_moe": "glm4moe", "minimax_m2": "minimax-m2",
    "minimax_m3_vl_text": "minimax-m3",
    "ernie4_5_moe": "ernie4_5-moe", "hunyuan_v1_moe": "hunyuan-moe", "olmoe": "olmoe", "granitemoe": "granitemoe",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "deepseek_v32": "deepseek32", "glm_moe_dsa": "glm-dsa",
    "gemma3_text": "gemma3", "phimoe": "phimoe", "lfm2": "lfm2",
    "qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
    "phi3": "phi3", "gemma4_text": "gemma4", "smollm3": "smollm3", "seed_oss": "seed_oss", "dots1": "dots1",
    "glm4": "glm4", "olmo2": "olmo2", "olmo3": "olmo2", "exaone4": "exaone4",
    "lfm2_moe": "lfm2moe", "exaone_moe": "exaone-moe", "granite": "granite", "ernie4_5": "ernie4_5",
    "hunyuan_v1_dense": "hunyuan-dense", "glm": "chatglm",
    "granitemoeshared": "granitemoe", "granitemoehybrid": "granitehybrid", "nemotron_h": "nemotron_h_moe",
    "ministral3": "mistral3", "mistral4": "mistral4", "afmoe": "afmoe", "laguna": "laguna",
    "hy_v3": "hy_v3", "mellum": "mellum", "sarvam_moe": "bailingmoe2",
    "deepseek_v4": "deepseek4", "glm5_next_text": "glm5-next",
    "kimi_linear": "kimi-linear", "bailing_hybrid": "bailingmoe3", "cohere": "command-r", "cohere2": "cohere2",
    "gemma2": "gemma2", "mimo_v2_flash": "mimo2", "step3p5": "step35",
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """A tensor as its file holds it: rows of bytes, and the shape that they stand for."""

    type: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Raw:
    """A value of the metadata as its file holds it, with its type."""

    type: int
    data: bytes


def text(value: str, size: str = "<Q") -> bytes:
    encoded = value.encode(errors="surrogateescape")
    return struct.pack(size, len(encoded)) + encoded


def value(given: Any, size: str = "<Q") -> bytes:
    """With its type: bool, uint32, int32 where negative, float32, text, or a list of one of them."""
    if isinstance(given, Raw):
        return struct.pack("<I", given.type) + given.data
    if isinstance(given, list):
        kind = value(given[0] if given else 0, size)[:4]
        items = b"".join(value(item, size)[4:] for item in given)
        return struct.pack("<I", 9) + kind + struct.pack(size, len(given)) + items
    if isinstance(given, bool):
        return struct.pack("<I?", 7, given)
    if isinstance(given, int):
        return struct.pack("<II", 4, given) if given >= 0 else struct.pack("<Ii", 5, given)
    return struct.pack("<If", 6, given) if isinstance(given, float) else struct.pack("<I", 8) + text(given, size)


def stored(array: np.ndarray | Blocks) -> Blocks:
    if isinstance(array, Blocks):
        return array
    type = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}[array.dtype.name]
    return Blocks(type, array.shape, np.ascontiguousarray(array).tobytes())


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray | Blocks], version: int = 3
) -> Path:
    size = "<I" if version == 1 else "<Q"
    parts = [b"GGUF", struct.pack("<I", version), struct.pack(size, len(tensors)), struct.pack(size, len(metadata))]
    parts += [text(name, size) + value(item, size) for name, item in metadata.items()]
    place, contents = 0, b""
    for name, array in tensors.items():
        blocks = stored(array)
        sizes = b"".join(struct.pack(size, n) for n in reversed(blocks.shape))
        parts.append(text(name, size) + struct.pack("<I", len(blocks.shape)) + sizes)
        parts.append(struct.pack("<IQ", NUMBERS[blocks.type], place))
        padded = blocks.data + bytes(-len(blocks.data) % ALIGNMENT)
        place, contents = place + len(padded), contents + padded
    header = b"".join(parts)
    path.write_bytes(header + bytes(-len(header) % ALIGNMENT) + contents)
    return path


_NAMES = (
    (r"model\.embed_tokens\.weight", "token_embd.weight"),
    (r"model\.norm\.(\w+)", r"output_norm.\1"),
    (r"model\.embedding_norm\.weight", "token_embd_norm.weight"),
    (r"lm_head\.(\w+)", r"output.\1"),
    (r"(.*)\.(?:input_layernorm|operator_norm)\.(\w+)", r"\1.attn_norm.\2"),
    (r"(.*)\.conv\.(conv|in_proj|out_proj)\.weight", r"\1.shortconv.\2.weight"),
    (r"model\.hc_head\.hc_(\w+)", r"output_hc_\1.weight"),
    (r"head\.weight", "output.weight"),
    (r"(.*)\.(hc_(?:attn|ffn)_\w+)", r"\1.\2.weight"),
    (r"(.*)\.attn_norm\.weight", r"\1.attn_norm.weight"),
    (r"(.*)\.attn\.wq_([ab])\.weight", r"\1.attn_q_\2.weight"),
    (r"(.*)\.attn\.q_norm\.weight", r"\1.attn_q_a_norm.weight"),
    (r"(.*)\.attn\.wkv\.weight", r"\1.attn_kv.weight"),
    (r"(.*)\.attn\.norm\.weight", r"\1.attn_kv_a_norm.weight"),
    (r"(.*)\.attn\.attn_sink", r"\1.attn_sinks.weight"),
    (r"(.*)\.attn\.wo_([ab])\.weight", r"\1.attn_output_\2.weight"),
    (r"(.*)\.attn\.compressor\.w?(kv|gate|ape|norm)(?:\.weight)?", r"\1.attn_compressor_\2.weight"),
    (r"(.*)\.attn\.indexer\.compressor\.w?(kv|gate|ape|norm)(?:\.weight)?", r"\1.indexer_compressor_\2.weight"),
    (r"(.*)\.attn\.indexer\.wq_b\.weight", r"\1.indexer.attn_q_b.weight"),
    (r"(.*)\.attn\.indexer\.weights_proj\.weight", r"\1.indexer.proj.weight"),
    (r"(.*)\.ffn\.gate\.tid2eid", r"\1.ffn_gate_tid2eid.weight"),
    (r"(.*)\.ffn\.gate\.bias", r"\1.exp_probs_b.bias"),
    (r"(.*)\.ffn_norm\.weight", r"\1.ffn_norm.weight"),
    (r"(.*)\.self_attn\.(?:qkv_proj|query_key_value)\.weight", r"\1.attn_qkv.weight"),
    (r"(.*)\.mlp\.gate_up_proj\.weight", r"\1.ffn_up.weight"),
    (r"(.*)\.pre_feedforward_layernorm\.weight", r"\1.ffn_norm.weight"),
    (r"(.*)\.(pre|post)_feedforward_layernorm_([12])\.weight", r"\1.\2_ffw_norm_\3.weight"),
    (r"(.*)\.layer_scalar", r"\1.layer_output_scale.weight"),
    (r"(.*)\.router\.proj\.weight", r"\1.ffn_gate_inp.weight"),
    (r"(.*)\.router\.scale", r"\1.ffn_gate_inp.scale"),
    (r"(.*)\.router\.per_expert_scale", r"\1.ffn_down_exps.scale"),
    (r"(.*)\.post_feedforward_layernorm\.weight", r"\1.post_ffw_norm.weight"),
    (r"(.*)\.self_attn\.indexer\.wq_b\.weight", r"\1.indexer.attn_q_b.weight"),
    (r"(.*)\.self_attn\.indexer\.wk\.weight", r"\1.indexer.attn_k.weight"),
    (r"(.*)\.self_attn\.indexer\.k_norm\.(\w+)", r"\1.indexer.k_norm.\2"),
    (r"(.*)\.self_attn\.indexer\.index_kpool_compress_(gate|ape)", r"\1.indexer_compressor_\2.weight"),
    (r"(.*)\.self_attn\.indexer\.weights_proj\.weight", r"\1.indexer.proj.weight"),
    (r"(.*)\.self_attn\.index_([qk]_(?:proj|norm))\.weight", r"\1.indexer.\2.weight"),
    (r"(.*)\.self_attn\.(?:g|gate)_proj\.weight", r"\1.attn_gate.weight"),
    (r"(.*)\.pre_mlp_layernorm\.weight", r"\1.ffn_norm.weight"),
    (r"(.*)\.mlp\.router\.gate\.weight", r"\1.ffn_gate_inp.weight"),
    (r"(.*)\.experts\.e_score_correction_bias", r"\1.exp_probs_b.bias"),
    (r"(.*)\.self_attn\.([qkv])_conv1d\.weight", r"\1.ssm_conv1d_\2.weight"),
    (r"(.*)\.self_attn\.([fg])_([ab])_proj\.weight", r"\1.ssm_\2_\3.weight"),
    (r"(.*)\.self_attn\.f_proj\.weight", r"\1.ssm_f_a.weight"),
    (r"(.*)\.self_attn\.b_proj\.weight", r"\1.ssm_beta.weight"),
    (r"(.*)\.self_attn\.A_log", r"\1.ssm_a"),
    (r"(.*)\.self_attn\.dt_bias", r"\1.ssm_dt.bias"),
    (r"(.*)\.self_attn\.o_norm\.weight", r"\1.ssm_norm.weight"),
    (r"(.*)\.self_attn\.([qkv])_proj\.(\w+)", r"\1.attn_\2.\3"),
    (r"(.*)\.self_attn\.q_([ab])_proj\.weight", r"\1.attn_q_\2.weight"),
    (r"(.*)\.self_attn\.q_a_layernorm\.weight", r"\1.attn_q_a_norm.weight"),
    (r"(.*)\.self_attn\.kv_a_proj_with_mqa\.weight", r"\1.attn_kv_a_mqa.weight"),
    (r"(.*)\.self_attn\.kv_a_layernorm\.weight", r"\1.attn_kv_a_norm.weight"),
    (r"(.*)\.self_attn\.kv_b_proj\.weight", r"\1.attn_kv_b.weight"),
    (r"(.*)\.self_attn\.(?:o_proj|out_proj)\.(\w+)", r"\1.attn_output.\2"),
    (r"(.*)\.self_attn\.(?:q_norm|q_layernorm|query_layernorm)\.weight", r"\1.attn_q_norm.weight"),
    (r"(.*)\.self_attn\.(?:k_norm|k_layernorm|key_layernorm)\.weight", r"\1.attn_k_norm.weight"),
    (r"(.*)\.self_attn\.(?:sinks|attention_sink_bias)", r"\1.attn_sinks.weight"),
    (r"(.*)\.linear_attn\.in_proj_qkv\.weight", r"\1.attn_qkv.weight"),
    (r"(.*)\.linear_attn\.in_proj_z\.weight", r"\1.attn_gate.weight"),
    (r"(.*)\.linear_attn\.in_proj_qkvz\.weight", r"\1.ssm_in.weight"),
    (r"(.*)\.linear_attn\.in_proj_ba\.weight", r"\1.ssm_ba.weight"),
    (r"(.*)\.linear_attn\.in_proj_a\.weight", r"\1.ssm_alpha.weight"),
    (r"(.*)\.linear_attn\.in_proj_b\.weight", r"\1.ssm_beta.weight"),
    (r"(.*)\.linear_attn\.A_log", r"\1.ssm_a"),
    (r"(.*)\.linear_attn\.dt_bias", r"\1.ssm_dt.bias"),
    (r"(.*)\.linear_attn\.conv1d\.weight", r"\1.ssm_conv1d.weight"),
    (r"(.*)\.linear_attn\.norm\.weight", r"\1.ssm_norm.weight"),
    (r"(.*)\.linear_attn\.out_proj\.weight", r"\1.ssm_out.weight"),
    (r"model\.embeddings\.weight", "token_embd.weight"),
    (r"model\.norm_f\.weight", "output_norm.weight"),
    (r"(model\.layers\.\d+)\.norm\.weight", r"\1.attn_norm.weight"),
    (r"(.*)\.mixer\.([qkv])_proj\.weight", r"\1.attn_\2.weight"),
    (r"(.*)\.mixer\.o_proj\.weight", r"\1.attn_output.weight"),
    (r"(.*)\.mixer\.(up|down)_proj\.weight", r"\1.ffn_\2.weight"),
    (r"(.*)\.mixer\.fc1_latent_proj\.weight", r"\1.ffn_latent_down.weight"),
    (r"(.*)\.mixer\.fc2_latent_proj\.weight", r"\1.ffn_latent_up.weight"),
    (r"(.*)\.(?:mamba|mixer)\.in_proj\.weight", r"\1.ssm_in.weight"),
    (r"(.*)\.(?:mamba|mixer)\.conv1d\.(\w+)", r"\1.ssm_conv1d.\2"),
    (r"(.*)\.(?:mamba|mixer)\.dt_bias", r"\1.ssm_dt.bias"),
    (r"(.*)\.(?:mamba|mixer)\.A_log", r"\1.ssm_a"),
    (r"(.*)\.(?:mamba|mixer)\.D", r"\1.ssm_d"),
    (r"(.*)\.(?:mamba|mixer)\.norm\.weight", r"\1.ssm_norm.weight"),
    (r"(.*)\.(?:mamba|mixer)\.out_proj\.weight", r"\1.ssm_out.weight"),
    (r"(.*)\.post_self_attn_layernorm\.weight", r"\1.post_attention_norm.weight"),
    (r"(.*)\.post_mlp_layernorm\.weight", r"\1.post_ffw_norm.weight"),
    (r"(.*)\.post_attention_layernorm\.(\w+)", r"\1.ffn_norm.\2"),
    (r"(.*)\.mlp\.expert_bias", r"\1.exp_probs_b"),  # of Hunyuan 3
    (r"(.*)\.mlp\.router\.gate\.weight", r"\1.ffn_gate_inp.weight"),
    (r"(.*)\.e_score_correction_bias", r"\1.exp_probs_b.bias"),
    (r"(.*)\.expert_bias", r"\1.exp_probs_b.bias"),
    (r"(.*)\.shared_expert_gate\.weight", r"\1.ffn_gate_inp_shexp.weight"),
    (r"(.*)\.shared_(?:expert|experts|mlp)\.(gate|up|down)_proj\.weight", r"\1.ffn_\2_shexp.weight"),
    (r"(.*)\.experts\.(\d+)\.(gate|up|down)_proj\.weight", r"\1.ffn_\3.\2.weight"),
    (r"(.*)\.(?:mlp|feed_forward)\.(gate|up|down)_proj\.(\w+)", r"\1.ffn_\2.\3"),
    (r"(.*)\.(?:gate|gate\.wg|router|router\.layer)\.(weight|bias)", r"\1.ffn_gate_inp.\2"),
)
_MODULES = r"(blk\.\d+)\.(?:mlp|feed_forward|block_sparse_moe|mixer|ffn)(?:\.gate)?(?:\.moe_statics)?\."
_WORDS = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


def gguf_name(name: str) -> str:
    for old, new in _WORDS.items():
        name = name.replace(old, new)
    for pattern, new in _NAMES:
        if re.fullmatch(pattern, name):
            found = re.sub(rf"^{pattern}$", new, name).replace("model.layers.", "blk.")
            return re.sub(_MODULES, r"\1.", found)
    raise KeyError(name)


def gguf_tensors(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their names in GGUF files: experts stacked, queries and keys permuted, rows of
    one dimension and routers as float32.
    """
    found: dict[str, np.ndarray] = {}
    if config["model_type"] in ("bailing_hybrid", "sarvam_moe"):
        tensors = dict(_bailing(tensors))
    plus = config["model_type"] in ("gemma2", "gemma3_text", "minimax_m3_vl_text", "step3p5")
    for name, array in tensors.items():
        if plus and name.endswith("norm.weight"):
            array = array.astype(np.float32) + 1
        post_norm = config["model_type"].startswith(("gemma", "olmo2", "olmo3", "exaone4", "afmoe"))
        if post_norm and name.endswith("post_attention_layernorm.weight"):
            found[f"blk.{name.split('.')[2]}.post_attention_norm.weight"] = array
        elif config["model_type"] == "gemma4_text" and name.endswith("gate_up_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_gate_up_exps.weight"] = array
        elif "shared_mlp" in name and name.endswith("_linear.weight"):
            found |= _shared_mlp(config, name, array)
        elif name.endswith(("gate_up_proj", "input_linear.weight", "gate_up_proj_bias")):
            found |= _halves(config["model_type"], name, array)
        elif name.endswith(("experts.down_proj", "output_linear.weight", "down_proj_bias")):
            kind, layer = "bias" if name.endswith("_bias") else "weight", name.split(".")[2]
            turned = kind == "weight" and config["model_type"] == "gpt_oss"
            found[f"blk.{layer}.ffn_down_exps.{kind}"] = array.swapaxes(1, 2) if turned else array
        else:
            found[gguf_name(name)] = array
    if config["model_type"] in ("gpt_oss", "glm4_moe", "seed_oss"):
        found = {name.replace("ffn_norm", "post_attention_norm"): array for name, array in found.items()}
    if config["model_type"] in (
        "llama",
        "mixtral",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "granitemoehybrid",
        "nemotron_h",
        "smollm3",
        "ministral3",
    ):
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        found = {name: _permuted(array, heads.get(name.split(".")[-2], 0)) for name, array in found.items()}
    if config["model_type"] == "gemma4_text":
        half = config["global_head_dim"] // 2
        turning = int(half * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
        found["rope_freqs.weight"] = np.array([1.0] * turning + [1e30] * (half - turning), np.float32)
    if (config.get("rope_scaling") or {}).get("rope_type") == "longrope":
        for which in ("short", "long"):
            found[f"rope_factors_{which}.weight"] = np.array(config["rope_scaling"][f"{which}_factor"], np.float32)
    if "linear_num_key_heads" in config:
        found = _delta(config, found)
    if "mamba_n_heads" in config or "mamba_num_heads" in config:
        found = _mamba(config, found)
    if "kv_lora_rank" in config:
        found = _latent(config, found)
    if config["model_type"] in _KIMI_DELTA:
        sign = 1 if config["model_type"] == "bailing_hybrid" else -1
        rates = {name: sign * np.exp(array.astype(np.float32)) for name, array in found.items() if "ssm_a" in name}
        found |= rates
    return {name: _plain(name, array) for name, array in _stacked(found).items()}


def _bailing(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Mixers under the names of others; gates of channels and gates of heads have one name in checkpoints."""
    for name, array in tensors.items():
        name = name.replace(".attention.", ".self_attn.").replace(".dense.", ".o_proj.")
        name = name.replace("word_embeddings", "embed_tokens")
        channels = name.replace("g_proj.weight", "A_log").replace("self_attn", "attention") in tensors
        yield name.replace("g_proj", "g_a_proj" if channels else "gate_proj"), array


def _delta(config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Norms with their 1, rates of decay, projections apart; value heads in turn unless they were by key head."""
    groups, keys = config["linear_num_key_heads"], config["linear_num_key_heads"] * config["linear_key_head_dim"]
    found: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        name = name.replace("ffn_norm", "post_attention_norm")
        if name.endswith("ssm_a"):
            array = -np.exp(array.astype(np.float32))
        elif name.endswith("norm.weight") and not name.endswith("ssm_norm.weight"):
            array = array.astype(np.float32) + 1
        if name.endswith("ssm_in.weight"):
            of_value = config["linear_num_value_heads"] // groups * config["linear_value_head_dim"]
            dim, heads = config["linear_key_head_dim"], array.reshape(groups, -1, array.shape[-1])
            parts = np.split(heads, [dim, 2 * dim, 2 * dim + of_value], axis=1)
            flat = [part.reshape(-1, array.shape[-1]) for part in parts]
            found[name.replace("ssm_in", "attn_qkv")] = np.concatenate(flat[:3])
            found[name.replace("ssm_in", "attn_gate")] = flat[3]
        elif config["model_type"] == "qwen3_next":
            found[name] = array
        elif re.search(r"attn_qkv|ssm_conv1d", name):
            found[name] = np.concatenate([array[: 2 * keys], _in_turn(array[2 * keys :], groups, config)])
        elif re.search(r"attn_gate|ssm_(alpha|beta|a$|dt)", name):
            found[name] = _in_turn(array, groups, config)
        elif "ssm_out" in name:
            found[name] = _in_turn(array.T, groups, config).T
        else:
            found[name] = array
    return found


def _mamba(config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rates of decay as such; what is one for each head as a column; norms by groups."""
    found: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name.endswith("ssm_a"):
            array = -np.exp(array.astype(np.float32))
        if name.endswith("ssm_norm.weight"):
            array = array.reshape(config.get("mamba_n_groups") or config["n_groups"], -1).astype(np.float32)
        found[name] = array
    return found


def _shared_mlp(config: Mapping[str, Any], name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """What all rows share in Granite 4: beside experts, or alone."""
    layer, ending = name.split(".")[2], "_shexp" * bool(config["num_local_experts"])
    parts = ("down",) if "output_linear" in name else ("gate", "up")
    halves = np.split(array, len(parts))
    return {f"blk.{layer}.ffn_{part}{ending}.weight": half for part, half in zip(parts, halves, strict=True)}


def _in_turn(rows: np.ndarray, groups: int, config: Mapping[str, Any]) -> np.ndarray:
    """The first value head of every key head, then the second ones."""
    each = config["linear_num_value_heads"] // groups
    return rows.reshape(groups, each, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


def _latent(config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keys, turned, and values of each head apart."""
    found: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if name.endswith("attn_kv_b.weight"):
            heads = array.reshape(config["num_attention_heads"], -1, array.shape[1])
            keys, values = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
            found[name.replace("kv_b", "k_b")] = keys.swapaxes(1, 2)
            found[name.replace("kv_b", "v_b")] = values
        else:
            found[name] = array
    return found


def _halves(family: str, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Gate and up of experts that a checkpoint holds as one."""
    kind, layer = "bias" if name.endswith("_bias") else "weight", name.split(".")[2]
    if family == "gpt_oss":
        array = array.swapaxes(1, 2) if kind == "weight" else array
        gate, up = array[:, 0::2], array[:, 1::2]
    else:
        gate, up = np.split(array, 2, axis=1)
    return {f"blk.{layer}.ffn_gate_exps.{kind}": gate, f"blk.{layer}.ffn_up_exps.{kind}": up}


def _permuted(array: np.ndarray, heads: int) -> np.ndarray:
    if not heads:
        return array
    return array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {}
    plain: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        match = re.fullmatch(r"(blk\.\d+\.ffn_\w+)\.(\d+)\.weight", name)
        if match:
            found.setdefault(f"{match[1]}_exps.weight", []).append(array)
        else:
            plain[name] = array
    return plain | {name: np.stack(arrays) for name, arrays in found.items()}


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.int64:
        return array.astype(np.int32)
    squeezed = array.squeeze() if array.size > 1 else array
    return squeezed.astype(np.float32) if squeezed.ndim == 1 or "_inp" in name else squeezed


_KIMI_DELTA = ("kimi_linear", "bailing_hybrid", "glm5_next_text")
_SIGMOID = (
    "glm4_moe", "minimax_m2", "minimax_m3_vl_text", "dots1", "lfm2_moe", "exaone_moe", "laguna", "sarvam_moe",
    "mimo_v2_flash", "step3p5",
)  # fmt: skip
_ONE_WIDTH = (
    "mixtral",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
    "phimoe",
)  # that of experts is that of all feed-forwards


def gguf_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of a model with this config.json."""
    get, family = config.get, config["model_type"]
    experts = next((get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
                    if get(name)), None)  # fmt: skip
    wide = get("moe_intermediate_size") or get("intermediate_size")
    turning = get("rotary_dim") or (
        config.get("head_dim", 0) // 2 if family.startswith("glm") else config.get("head_dim")
    )
    turning = int(turning * config["partial_rotary_factor"]) if family == "phi3" else turning
    slides = [kind == "sliding_attention" for kind in get("layer_types") or ()]
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": get("intermediate_size"),
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": get("head_dim"),
        "attention.value_length": get("v_head_dim") or get("head_dim"),
        "attention.layer_norm_rms_epsilon": get("rms_norm_eps") or config["layer_norm_epsilon"],
        "attention.layer_norm_epsilon": get("layer_norm_eps"),
        "rope.freq_base": get("rope_theta"),
        "rope.dimension_count": turning,
        "expert_count": experts,
        "expert_used_count": next((get(n) for n in ("num_experts_per_tok", "moe_k", "moe_topk") if get(n)), None),
        "expert_feed_forward_length": wide if experts and family not in _ONE_WIDTH else None,
        "expert_shared_feed_forward_length": get("shared_expert_intermediate_size") or get("shared_intermediate_size"),
        "expert_shared_count": get("n_shared_experts") or get("num_shared_experts") or get("moe_num_shared_experts"),
        "expert_gating_func": 2 if family in _SIGMOID else None,
        "expert_group_count": get("n_group"),
        "expert_group_used_count": get("topk_group"),
        "expert_weights_scale": next(
            (get(n) for n in ("routed_scaling_factor", "route_scale", "moe_routed_scaling_factor") if get(n)), None
        ),
        "expert_weights_norm": get("norm_topk_prob") if family == "dots1" else None,
        "leading_dense_block_count": next(
            (get(n) for n in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index") if get(n)), None
        ),
        "attention.sliding_window": get("sliding_window"),
        "attention.sliding_window_pattern": slides if family in ("olmo3", "exaone_moe") else None,
        "attention.scale": get("attention_multiplier"),
        "embedding_scale": get("embedding_multiplier"),
        "residual_scale": get("residual_multiplier"),
        "logit_scale": get("logits_scaling") or get("logit_scale"),
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
    }  # fmt: skip
    if rank := get("kv_lora_rank"):
        turned, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
        found |= {
            "attention.head_count_kv": 1,
            "attention.key_length": rank + turned,
            "attention.value_length": rank,
            "attention.key_length_mla": nope + turned,
            "attention.value_length_mla": config["v_head_dim"],
            "attention.kv_lora_rank": rank,
            "attention.q_lora_rank": get("q_lora_rank"),
            "rope.dimension_count": turned,
            "expert_gating_func": 1 if family in ("deepseek_v2", "mistral4") else 2,
            "expert_weights_norm": family != "deepseek_v2",
            "attention.indexer.head_count": get("index_n_heads"),
            "attention.indexer.key_length": get("index_head_dim"),
            "attention.indexer.top_k": get("index_topk"),
        }
    if layer_types := get("layer_types"):
        kv_heads = config["num_key_value_heads"]
        found |= {
            "attention.head_count_kv": [0 if kind in ("conv", "mamba") else kv_heads for kind in layer_types],
            "shortconv.l_cache": get("conv_L_cache"),
        }
    if (scaling := get("rope_scaling")) and scaling["rope_type"] == "longrope":
        found |= {
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.attn_factor": scaling.get("short_mscale", scaling.get("attention_factor")),
        }
    elif scaling:
        found |= {
            "rope.scaling.type": scaling["rope_type"],
            "rope.scaling.factor": scaling["factor"],
            "rope.scaling.original_context_length": scaling.get("original_max_position_embeddings"),
            "rope.scaling.yarn_beta_fast": scaling.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": scaling.get("beta_slow"),
            "rope.scaling.yarn_log_multiplier": (1 if family == "ministral3" else 0.1) * scaling["mscale_all_dim"]
            if "mscale_all_dim" in scaling
            else None,
            "attention.temperature_scale": scaling.get("llama_4_scaling_beta"),
            "attention.temperature_length": scaling.get("original_max_position_embeddings")
            if "llama_4_scaling_beta" in scaling
            else None,
        }
    if groups := get("linear_num_key_heads"):
        values = config["linear_num_value_heads"]
        found |= {
            "rope.dimension_count": round(config["head_dim"] * get("partial_rotary_factor", 0.25)),
            "ssm.conv_kernel": get("linear_conv_kernel_dim", 4),
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": groups,
            "ssm.time_step_rank": values,
            "ssm.inner_size": values * config["linear_value_head_dim"],
        }
    if heads := get("mamba_n_heads"):
        found |= {
            "ssm.conv_kernel": get("mamba_d_conv", 4),
            "ssm.state_size": config["mamba_d_state"],
            "ssm.group_count": config["mamba_n_groups"],
            "ssm.time_step_rank": heads,
            "ssm.inner_size": heads * config["mamba_d_head"],
            "rope.scaling.finetuned": False,
        }
    if family == "gemma4_text":
        found |= _gemma4(config)
    if family == "nemotron_h":
        found |= _nemotron(config)
    if family == "deepseek_v4":
        found |= _deepseek4(config)
    if family == "minimax_m3_vl_text":
        found |= _minimax_m3(config)
    if family == "hy_v3":
        found |= _hy_v3(config)
    if family == "mellum":
        found |= _mellum(config, slides)
    if family == "laguna":
        found |= _laguna(config, slides)
    if family in _KIMI_DELTA:
        found |= _kimi_delta(config)
    if family == "mimo_v2_flash":
        found |= _mimo(config, slides)
    if family == "step3p5":
        found |= _step(config, slides)
    architecture = ARCHITECTURES[family]
    named = {f"{architecture}.{name}": item for name, item in found.items() if item is not None}
    return {"general.architecture": architecture, **named}


def _deepseek4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the layer that predicts further tokens, of which files tell nevertheless."""
    kinds = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    main, rope = (config["rope_parameters"][which] for which in ("main", "compress"))
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.output_lora_rank": config["o_lora_rank"],
        "attention.output_group_count": config["o_groups"],
        "attention.compress_ratios": [*(kinds[kind] for kind in config["layer_types"]), 0],
        "attention.compress_rope_freq_base": rope["rope_theta"],
        "attention.indexer.head_count": config["index_n_heads"],
        "attention.indexer.key_length": config["index_head_dim"],
        "attention.indexer.top_k": config["index_topk"],
        "rope.freq_base": main["rope_theta"],
        "rope.dimension_count": int(config["head_dim"] * config["partial_rotary_factor"]),
        "rope.scaling.type": rope["rope_type"],
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "hash_layer_count": config["mlp_layer_types"].count("hash_moe"),
        "expert_gating_func": 4,
        "expert_weights_norm": True,
        "expert_weights_scale": config.get("routed_scaling_factor", 1.5),
        "nextn_predict_layers": 1,
        **_streams(config),
    }


def _glm5_next(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "kda.head_dim": config["linear_head_dim"],
        "kda.gate_lower_bound": config.get("linear_lower_bound", -5.0),
        "attention.layer_norm_epsilon": 1e-6,
        "attention.indexer.kpool": config["index_kpool"],
        **_streams(config),
    }


def _streams(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "swiglu_clamp_exp": [10.0] * config["num_hidden_layers"],
        "hyper_connection.count": config.get("hc_mult", 4),
        "hyper_connection.sinkhorn_iterations": 20,
        "hyper_connection.epsilon": 1e-6,
    }


def _minimax_m3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "feed_forward_length": config["dense_intermediate_size"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "expert_shared_count": config["shared_intermediate_size"] // config["intermediate_size"],
        "expert_weights_scale": config.get("routed_scaling_factor", 2.0),
        "expert_weights_norm": True,
        "leading_dense_block_count": config["mlp_layer_types"].count("dense"),
        "attention.indexer.head_count": config["index_n_heads"],
        "attention.indexer.key_length": config["index_head_dim"],
        "attention.indexer.top_k": config["index_topk_blocks"],
        "attention.indexer.block_size": 128,
        "attention.indexer.local_blocks": 1,
    }


def _hy_v3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "expert_shared_count": None,
        "expert_shared_feed_forward_length": config["num_shared_experts"] * config["moe_intermediate_size"],
        "expert_weights_norm": True,
        "expert_weights_scale": config.get("router_scaling_factor", 2.826),
        "expert_gating_func": 2,
    }


def _mellum(config: Mapping[str, Any], slides: list[bool]) -> dict[str, Any]:
    full, sliding = (config["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    return {
        "attention.sliding_window_pattern": slides,
        "rope.freq_base": full["rope_theta"],
        "rope.freq_base_swa": sliding["rope_theta"],
        "rope.scaling.type": full["rope_type"],
        "rope.scaling.factor": full["factor"],
        "rope.scaling.original_context_length": full["original_max_position_embeddings"],
    }


def _mimo(config: Mapping[str, Any], slides: list[bool]) -> dict[str, Any]:
    """Layers with a window have twice the key heads, another rope; windows are of tokens before the one that looks."""
    kv_heads = config["num_key_value_heads"]
    return {
        "attention.head_count_kv": [2 * kv_heads if one else kv_heads for one in slides],
        "attention.sliding_window": config["sliding_window"] - 1,
        "attention.sliding_window_pattern": slides,
        "attention.value_scale": config["attention_value_scale"],
        "rope.dimension_count": config["head_dim"] // 3,
        "rope.freq_base": 5e6,
        "rope.freq_base_swa": 1e4,
    }


def _laguna(config: Mapping[str, Any], slides: list[bool]) -> dict[str, Any]:
    """Layers have own numbers of heads, and those that slide another rope."""
    full, sliding = (config["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    return {
        "attention.head_count": config["num_attention_heads_per_layer"],
        "attention.sliding_window_pattern": slides,
        "leading_dense_block_count": 1,
        "rope.freq_base": full["rope_theta"],
        "rope.freq_base_swa": sliding["rope_theta"],
        "rope.dimension_count": int(config["head_dim"] * full["partial_rotary_factor"]),
        "rope.dimension_count_swa": int(config["head_dim"] * sliding["partial_rotary_factor"]),
        "rope.scaling.type": full["rope_type"],
        "rope.scaling.factor": full["factor"],
        "rope.scaling.original_context_length": full["original_max_position_embeddings"],
    }


def _step(config: Mapping[str, Any], slides: list[bool]) -> dict[str, Any]:
    """Lists tell of a layer that predicts further tokens, too; what turns without a window is half of what is said."""
    full, sliding = (config["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    heads = config["num_attention_heads"], config["num_sliding_attention_heads"]
    slides = [*slides, True]
    return {
        "block_count": len(slides),
        "nextn_predict_layers": 1,
        "attention.head_count": [heads[one] for one in slides],
        "attention.head_count_kv": [config["num_key_value_heads"]] * len(slides),
        "attention.sliding_window_pattern": slides,
        "expert_shared_feed_forward_length": config["share_expert_dim"],
        "expert_weights_norm": True,
        "expert_weights_scale": config["moe_router_scaling_factor"],
        "leading_dense_block_count": config["mlp_layer_types"].count("dense"),
        "rope.freq_base": full["rope_theta"],
        "rope.freq_base_swa": sliding["rope_theta"],
        "swiglu_clamp_exp": [*config["swiglu_limits"], 0.0],
        "swiglu_clamp_shexp": [*config["swiglu_limits_shared"], 0.0],
    }


def _kimi_delta(config: Mapping[str, Any]) -> dict[str, Any]:
    linear = config.get("linear_attn_config", {})
    numbered = range(1, config["num_hidden_layers"] + 1)
    default = [number in linear["full_attn_layers"] for number in numbered] if linear else []
    full = [kind != "linear_attention" for kind in config.get("layer_types", ())] or default
    found = {
        "attention.head_count_kv": [int(attends) for attends in full],
        "ssm.conv_kernel": linear.get("short_conv_kernel_size") or config.get("short_conv_kernel_size"),
        "kda.head_dim": linear.get("head_dim") or config.get("head_dim"),
    }
    if config["model_type"] == "kimi_linear":
        return found
    if config["model_type"] == "glm5_next_text":
        return found | _glm5_next(config)
    return found | {
        "kda.safe_gate": config.get("kda_safe_gate", True),
        "kda.gate_lower_bound": config.get("kda_lower_bound", -5.0),
        "expert_weights_norm": True,
    }


def _nemotron(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer is, is told by its numbers of key heads and of rows of a feed-forward."""
    kinds, experts = config["layers_block_type"], "moe" in config["layers_block_type"]
    wide = config["moe_intermediate_size"] if experts else config["intermediate_size"]
    heads = config["mamba_num_heads"]
    return {
        "feed_forward_length": [wide if kind in ("mlp", "moe") else 0 for kind in kinds],
        "attention.head_count_kv": [config["num_key_value_heads"] if kind == "attention" else 0 for kind in kinds],
        "expert_shared_feed_forward_length": config["moe_shared_expert_intermediate_size"],
        "moe_latent_size": config.get("moe_latent_size"),
        "ssm.conv_kernel": config.get("conv_kernel", 4),
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * config["mamba_head_dim"],
        "rope.scaling.finetuned": False,
    }


def _gemma4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that slide have other sizes and another rope."""
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    kv_heads = config["num_key_value_heads"], config.get("num_global_key_value_heads") or config["num_key_value_heads"]
    ropes = config["rope_parameters"]
    return {
        "attention.head_count_kv": [kv_heads[not one] for one in slides],
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "attention.key_length": config["global_head_dim"],
        "attention.value_length": config["global_head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "rope.freq_base": ropes["full_attention"]["rope_theta"],
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
        "rope.dimension_count": config["global_head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
        "expert_used_count": config.get("top_k_experts"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }


def write_model(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], extra: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint's tensors as one GGUF file."""
    return write_gguf(path, {**gguf_metadata(config), **(extra or {})}, gguf_tensors(config, tensors))


def split_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any], count: int) -> list[Path]:
    """The same as files NAME-00001-of-0000N.gguf; only the first has the metadata."""
    parts: Sequence[np.ndarray] = np.array_split(list(tensors), count)
    return [
        write_gguf(
            path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}.gguf"),
            {**(metadata if number == 0 else {}), "split.no": number, "split.count": count,
             "split.tensors.count": len(tensors)},
            {str(name): tensors[str(name)] for name in names},
        )
        for number, names in enumerate(parts)
    ]  # fmt: skip


def bf16(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)
