"""Models from GGUF files: the same store as from the safetensors of the same weights, bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import packed as packed_checkpoint
from checkpoints import random_tensors, write_tensors
from configs import CONFIGS
from dequantised import write_dequantised
from gguf_rig import ARCHITECTURES, Blocks, gguf_metadata, gguf_name, gguf_tensors, split_gguf, write_gguf, write_model
from safetensors.numpy import load_file

from hybrid.errors import ConfigError, WeightsError
from hybrid.files.gguf import is_gguf
from hybrid.files.gguf_types import TYPES_BY_NAME
from hybrid.formats.mix import parse_mix
from hybrid.models import model_spec
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.rope import inverse_frequencies
from hybrid.weights.checkpoints.gguf_blocks import values
from hybrid.weights.checkpoints.gguf_config import gguf_config
from hybrid.weights.checkpoints.gguf_files import read_gguf
from hybrid.weights.checkpoints.opening import describe_checkpoint, open_checkpoint
from hybrid.weights.hub import local_model
from hybrid.weights.pack import pack
from hybrid.weights.source import source_fingerprint
from hybrid.weights.store import Store

CHANGES: dict[str, dict[str, Any]] = {  # what these files cannot say, or say in one way alone
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_next": {"mlp_only_layers": []},
    "qwen3_5_text": {"linear_num_value_heads": 2},  # a key head each: else their order is another
    "hunyuan_v1_moe": {"tie_word_embeddings": True},
    "gemma3_text": {
        "num_hidden_layers": 7, "layer_types": None, "rope_parameters": None, "query_pre_attn_scalar": 24,
        "rope_theta": 1e5, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "phimoe": {"rope_scaling": {**CONFIGS["phimoe"]["rope_scaling"], "long_mscale": 1.1}},
    "phi3": {"rope_scaling": {**CONFIGS["phi3"]["rope_scaling"], "short_mscale": 1.25, "long_mscale": 1.25}},
    "olmo3": {
        "rope_parameters": None, "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "exaone_moe": {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mamba", "moe"]},
    "lfm2_moe": {"conv_bias": False},
    "afmoe": {"global_attn_every_n_layers": 4},
    "cohere2": {"layer_types": None, "num_hidden_layers": 5},
    "mellum": {"mlp_layer_types": ["sparse"] * 3},
    "sarvam_moe": {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    "glm5_next_text": {"linear_num_heads": 6},
    "gemma2": {"query_pre_attn_scalar": 24},
    "mimo_v2_flash": {"rope_parameters": None},
    "step3p5": {
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_theta": 1e3, "partial_rotary_factor": 1.0},
        }
    },
    "kimi_linear": {"linear_attn_config": {**CONFIGS["kimi_linear"]["linear_attn_config"], "num_heads": 6}},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    },
    "minimax_m3_vl_text": {"shared_intermediate_size": 72},
    "lfm2": {"conv_bias": False, "block_auto_adjust_ff_dim": False},
}  # fmt: skip


def model(family: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config = {**CONFIGS[family], **CHANGES.get(family, {})}
    return config, random_tensors(config)


def packed(source: Path, mix: str = "auto") -> Store:
    checkpoint, store = open_checkpoint(source), source.with_name(f"{source.name}-store")
    pack(checkpoint, store, parse_mix(mix, checkpoint.native))
    return Store.open(store, check=True)


def same_stores(one: Store, other: Store) -> bool:
    """Files have rates of decay as such, not their logarithms."""
    return list(one.tensors) == list(other.tensors) and all(
        np.allclose(one.array(name), other.array(name), 0, 1e-6)
        if name.endswith("decay_rate")
        else np.array_equal(one.array(name), other.array(name))
        for name in one.tensors
    )


def plain(spec: Any) -> str:
    """A spec in words, with numbers as float32 holds them, because GGUF files hold them so."""
    return re.sub(r"\d+\.\d*(?:e-?\d+)?", lambda number: f"{np.float32(number[0]):.7g}", repr(spec))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_model_is_the_same_from_either_file(tmp_path: Path, family: str) -> None:
    config, tensors = model(family)
    ours = packed(write_model(tmp_path / "model.gguf", config, tensors))
    theirs = packed_checkpoint(write_tensors(tmp_path / "hf", config, tensors))
    with ours, theirs:
        assert plain(ours.spec) == plain(theirs.spec)
        assert same_stores(ours, theirs)


def test_nemotron_h_without_experts_has_a_word_of_its_own(tmp_path: Path) -> None:
    kinds = ["mamba", "mlp", "attention", "mamba", "mlp"]
    config = {**CONFIGS["nemotron_h"], "layers_block_type": kinds, "n_routed_experts": None}
    word, tensors = "nemotron_h", random_tensors(config)
    metadata = {name.replace("nemotron_h_moe.", f"{word}."): item for name, item in gguf_metadata(config).items()}
    path = tmp_path / "model.gguf"
    ours = packed(write_gguf(path, {**metadata, "general.architecture": word}, gguf_tensors(config, tensors)))
    theirs = packed_checkpoint(write_tensors(tmp_path / "hf", config, tensors))
    with ours, theirs:
        assert same_stores(ours, theirs)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("nemotron_h", {**CHANGES["nemotron_h"], "moe_latent_size": 44}),
        ("cohere", {"use_qk_norm": True}),
    ],
)
def test_larger_models_of_a_family_have_more_tensors(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    config = {**CONFIGS[family], **changes}
    tensors = random_tensors(config)
    ours = packed(write_model(tmp_path / "model.gguf", config, tensors))
    theirs = packed_checkpoint(write_tensors(tmp_path / "hf", config, tensors))
    with ours, theirs:
        assert plain(ours.spec) == plain(theirs.spec)
        assert same_stores(ours, theirs)


@pytest.mark.parametrize("experts", [6, 0])
def test_granite_4_may_attend_in_every_layer(tmp_path: Path, experts: int) -> None:
    """Its files have the word of Granite 3: with experts, beside which there is what all rows share, or dense."""
    changes = {"layer_types": ["attention"] * 3, "position_embedding_type": "rope", "num_local_experts": experts}
    config = {**CONFIGS["granitemoehybrid"], **changes, "intermediate_size": 56}
    word, tensors = "granitemoe" if experts else "granite", random_tensors(config)
    metadata = {name.replace("granitehybrid.", f"{word}."): item for name, item in gguf_metadata(config).items()}
    path = tmp_path / "model.gguf"
    heads = {f"{word}.attention.head_count_kv": config["num_key_value_heads"], "general.architecture": word}
    ours = packed(write_gguf(path, {**metadata, **heads}, gguf_tensors(config, tensors)))
    theirs = packed_checkpoint(write_tensors(tmp_path / "hf", config, tensors))
    with ours, theirs:
        assert same_stores(ours, theirs)


QUANTISED = {
    "attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q5_0", "attn_output": "Q4_0", "ffn_gate": "Q4_K", "ffn_up": "Q5_K",
    "ffn_down": "Q6_K", "ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q4_K", "ffn_down_exps": "Q3_K", "output": "Q6_K",
    "token_embd": "Q4_1",
}  # fmt: skip
SECOND = {
    "attn_v": "Q8_0",
    "ffn_gate_exps": "MXFP4",
    "ffn_up_exps": "MXFP4",
    "ffn_down_exps": "Q8_0",
    "ffn_down": "Q4_1",
}


def quantised(name: str, array: np.ndarray) -> Blocks | np.ndarray:
    """Random blocks in place of a matrix."""
    kind = name.split(".")[-2]
    return in_blocks(name, array, (SECOND if name.startswith("blk.1.") else {}).get(kind, QUANTISED.get(kind)))


def in_blocks(name: str, array: np.ndarray, type: str | None) -> Blocks | np.ndarray:
    if array.ndim == 1 or type is None:
        return array
    found, random = TYPES_BY_NAME[type], np.random.default_rng(len(name))
    count = array.size // found.block
    blocks = random.integers(0, 256, (count, found.bytes), np.uint8)
    scales = np.full(count, 0.003, np.float16).view(np.uint8).reshape(-1, 2)
    if type == "MXFP4":
        blocks[:, 0] = 120
    else:
        at = {"Q6_K": (208,), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q4_1": (0, 2)}.get(type, (0,))
        for place in at:
            blocks[:, place : place + 2] = scales
    return Blocks(type, array.shape, blocks.tobytes())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_quantised_tensors_are_packed_as_they_are(tmp_path: Path, family: str) -> None:
    config, tensors = model(family)
    config |= {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 512}
    config |= {"tie_word_embeddings": False, "attention_bias": False}
    plain = gguf_tensors(config, random_tensors(config))
    blocks = {name: quantised(name, array) for name, array in plain.items()}
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), blocks)
    notes: list[str] = []
    checkpoint = open_checkpoint(path)
    pack(checkpoint, tmp_path / "store", notice=notes.append)
    with Store.open(tmp_path / "store", check=True) as store:
        first, second = (store.mix.of_layer(layer) for layer in (0, 1))
        found = load_file(write_dequantised(tmp_path / "plain", store) / "model.safetensors")
    if family == "mixtral":
        assert (first.experts, first.attention, first.head) == ("q4_k/q4_t", "q4_0/q4_0/q5_0/q4_0", "q6_k")
        assert (second.experts, second.attention) == ("mxfp4/q8_0", "q4_0/q4_0/q8_0/q4_0") and not notes
    else:
        assert (first.dense, second.dense) == ("q5_k/q6_k", "q5_k/q4_1") and not notes
    stored = gguf_tensors(config, found)
    for name, tensor in blocks.items():
        if isinstance(tensor, Blocks) and name != "token_embd.weight":
            rows = np.frombuffer(tensor.data, np.uint8).reshape(int(np.prod(tensor.shape[:-1])), -1)
            np.testing.assert_array_equal(stored[name], values(tensor.type, rows).reshape(tensor.shape), name)


# Sizes that blocks of 256 fit, the types of projections, and the formats of a layer.
MIXED = {
    "deepseek_v2": (
        {"num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 64},
        {"attn_q": "Q6_K", "attn_kv_a_mqa": "Q4_K", "attn_output": "Q5_K"},
        {0: "q6_k/q4_k/q5_k"},
    ),
    "deepseek_v3": (
        {"num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 64, "q_lora_rank": 256},
        {"attn_q_a": "Q4_K", "attn_kv_a_mqa": "Q8_0", "attn_q_b": "Q5_K", "attn_output": "Q4_K"},
        {0: "q4_k/q8_0/q5_k/q4_k"},
    ),
    "lfm2": (
        {"head_dim": 32, "num_attention_heads": 8},
        {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q4_K", "in_proj": "Q5_K",
         "out_proj": "Q4_K"},
        {0: "q5_k/q4_k", 1: "q4_k/q4_k/q6_k/q4_k"},
    ),
    "qwen3_5_text": (
        {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_value_head_dim": 64, "head_dim": 32,
         "num_attention_heads": 8},
        {"attn_qkv": "Q6_K", "attn_gate": "Q4_K", "ssm_out": "Q5_K", "attn_q": "Q4_K", "attn_v": "Q8_0"},
        {0: "q6_k/q4_k/q5_k"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MIXED)
def test_projections_of_a_layer_keep_their_types(tmp_path: Path, family: str) -> None:
    sizes, types, formats = MIXED[family]
    config = model(family)[0] | {"hidden_size": 256, "attention_bias": False, "tie_word_embeddings": False} | sizes
    plain = gguf_tensors(config, random_tensors(config))
    blocks = {name: in_blocks(name, array, types.get(name.split(".")[-2])) for name, array in plain.items()}
    path, notes = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), blocks), list[str]()
    pack(open_checkpoint(path), tmp_path / "store", notice=notes.append)
    with Store.open(tmp_path / "store", check=True) as store:
        assert {layer: store.mix.of_layer(layer).attention for layer in formats} == formats and not notes
        found = load_file(write_dequantised(tmp_path / "plain", store) / "model.safetensors")
    mixers = [name for name in found if re.search(r"(attn|conv)\.(\w+_)?(proj|qkv|z|with_mqa)\w*\.weight", name)]
    kept = {name: tensor for name in mixers if isinstance(tensor := blocks.get(gguf_name(name)), Blocks)}
    assert len(kept) >= len(types)
    for name, tensor in kept.items():
        rows = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1)
        np.testing.assert_array_equal(found[name], values(tensor.type, rows).reshape(tensor.shape), name)


def test_what_no_format_holds_is_opened_and_told(tmp_path: Path) -> None:
    config, _ = model("llama")
    config |= {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 512}
    config |= {"attention_bias": False, "num_hidden_layers": 1}
    plain = gguf_tensors(config, random_tensors(config))
    blocks = {name: quantised(name, array) for name, array in plain.items()}
    blocks["blk.0.ffn_up.weight"] = in_blocks("blk.0.ffn_up.weight", plain["blk.0.ffn_up.weight"], "Q6_K")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", gguf_metadata(config), blocks))
    assert checkpoint.native.attention == "q4_0/q4_0/q5_0/q4_0" and checkpoint.native.dense == "bf16/q6_k"
    assert checkpoint.native.head == "q4_1"  # of the embedding that it is tied to
    notes: list[str] = []
    pack(checkpoint, tmp_path / "store", notice=notes.append)
    assert len(notes) == 1 and "dense: Q4_K and Q6_K in the file, opened to bf16" in notes[0]
    assert checkpoint.notes(parse_mix("int8", checkpoint.native)) == []


def test_splits_are_one_model(tmp_path: Path) -> None:
    config, tensors = model("qwen3_moe")
    whole = write_model(tmp_path / "whole.gguf", config, tensors)
    files = split_gguf(tmp_path / "model.gguf", gguf_metadata(config), gguf_tensors(config, tensors), 3)
    assert [local_model(file) for file in files] == files[:1] * 3
    with packed(whole) as one, packed(files[0]) as other:
        assert same_stores(one, other)
    files[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(WeightsError, match="00002-of-00003.gguf: missing, one of 3 files"):
        open_checkpoint(files[0])
    with pytest.raises(WeightsError, match="is one of 3 files; they must keep their names"):
        open_checkpoint(tmp_path / "elsewhere.gguf")


def test_splits_must_belong_together(tmp_path: Path) -> None:
    config, tensors = model("llama")
    first, second = split_gguf(tmp_path / "model.gguf", gguf_metadata(config), gguf_tensors(config, tensors), 2)
    sound = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(WeightsError, match="does not say that it is part 2 of 2"):
        open_checkpoint(first)
    other = split_gguf(tmp_path / "other.gguf", gguf_metadata(config), {"a": tensors["model.norm.weight"]}, 2)
    second.write_bytes(other[1].read_bytes())
    with pytest.raises(WeightsError, match=r"tells of \d+ tensors in all"):
        open_checkpoint(first)
    second.write_bytes(sound)
    open_checkpoint(first).check()


def test_a_directory_may_hold_one_model(tmp_path: Path) -> None:
    config, tensors = model("llama")
    path = write_model(tmp_path / "one.gguf", config, tensors)
    (tmp_path / "mmproj-one.gguf").write_bytes(path.read_bytes())
    assert local_model(tmp_path) == path
    split_gguf(tmp_path / "two.gguf", gguf_metadata(config), gguf_tensors(config, tensors), 2)
    with pytest.raises(ConfigError, match="holds 2 GGUF models; give the path of one: one.gguf, two-00001-of-00002"):
        local_model(tmp_path)


def test_queries_keys_and_values_in_one_tensor(tmp_path: Path) -> None:
    config, tensors = model("llama")
    plain = gguf_tensors(config, tensors)
    fused = {name: array for name, array in plain.items() if ".attn_q." not in name}
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [plain[f"blk.{layer}.attn_{which}.{kind}"] for which in "qkv"]
            fused = {name: array for name, array in fused.items() if not name.startswith(f"blk.{layer}.attn_k.")}
            fused = {name: array for name, array in fused.items() if not name.startswith(f"blk.{layer}.attn_v.")}
            fused[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    fused = {name: array for name, array in fused.items() if name.split(".")[-2] not in ("attn_k", "attn_v")}
    one = packed(write_gguf(tmp_path / "one.gguf", gguf_metadata(config), plain))
    with one, packed(write_gguf(tmp_path / "other.gguf", gguf_metadata(config), fused)) as other:
        assert same_stores(one, other)


@pytest.mark.parametrize("form", ["gate_up", "apart"])
def test_experts_in_other_forms(tmp_path: Path, form: str) -> None:
    """gate and up of all experts in one tensor, or a tensor for each expert."""
    config, tensors = model("mixtral")
    plain = gguf_tensors(config, tensors)
    found = dict(plain)
    for name in plain:
        layer = name.rpartition(".ffn_")[0]
        if form == "apart" and name.endswith("_exps.weight"):
            found |= {name.replace("_exps", f".{i}"): array for i, array in enumerate(found.pop(name))}
        elif form == "gate_up" and name.endswith("ffn_gate_exps.weight"):
            both = [found.pop(f"{layer}.ffn_{which}_exps.weight") for which in ("gate", "up")]
            found[f"{layer}.ffn_gate_up_exps.weight"] = np.concatenate(both, axis=1)
    one = packed(write_gguf(tmp_path / "one.gguf", gguf_metadata(config), plain))
    with one, packed(write_gguf(tmp_path / "other.gguf", gguf_metadata(config), found)) as other:
        assert same_stores(one, other)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    config, tensors = model("glm4_moe")
    extra = {"blk.3.attn_norm.weight": np.ones(96, np.float32), "blk.3.nextn.eh_proj.weight": np.ones((4, 4), "f4")}
    metadata = {**gguf_metadata(config), "glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    path = write_gguf(tmp_path / "model.gguf", metadata, {**gguf_tensors(config, tensors), **extra})
    with packed(path) as store:
        assert len(store.spec.layers) == 3


def test_frequencies_may_have_factors(tmp_path: Path) -> None:
    config, tensors = model("llama")
    plain = gguf_tensors(config, tensors)
    factors = np.linspace(1, 8, 12, dtype=np.float32)
    path = write_gguf(tmp_path / "a.gguf", gguf_metadata(config), {**plain, "rope_freqs.weight": factors})
    rope = packed(path).spec.ropes[0]
    expected = 1 / (np.float32(1e4) ** (np.arange(0, 24, 2, dtype=np.float32) / 24) * factors)
    np.testing.assert_allclose(inverse_frequencies(rope)[0], expected, rtol=1e-6)
    path = write_gguf(tmp_path / "b.gguf", gguf_metadata(config), {**plain, "rope_freqs.weight": factors[:5]})
    with pytest.raises(ConfigError, match="has 5 factors, 24 dimensions turn"):
        inverse_frequencies(open_checkpoint(path).spec.ropes[0])


WRONG = {
    "architecture": ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; supported in GGUF"),
    "no architecture": ({"general.architecture": None}, "lacks general.architecture, which must be a text"),
    "missing": ({"llama.block_count": None}, "lacks llama.block_count, which must be an integer"),
    "type": ({"llama.block_count": 2.5}, "llama.block_count 2.5; it must be an integer"),
    "per layer": ({"llama.attention.head_count": [6, 4]}, r"head_count \[6, 4\]; it must be an integer, the same"),
    "heads": ({"llama.attention.head_count_kv": 4}, "is wrong: num_attention_heads 6 is not a multiple"),
    "values": ({"llama.attention.value_length": 16}, "value_length 16; it must be 24, as of keys"),
    "rope": ({"llama.rope.scaling.type": "ntk"}, "rope.scaling.type 'ntk'; it must be none, linear or yarn"),
    "late queries": (
        {"llama.attention.temperature_scale": 0.1},
        r"attention.temperature_scale 0\.1\d*; it must be absent or 0",
    ),
    "layers": ({"llama.block_count": 3}, "tensor blk.2.attn_norm.weight is missing, its metadata asks for it"),
    "fewer layers": ({"llama.block_count": 1}, "tensor blk.1.attn_norm.weight has no place in a model"),
    "width": ({"llama.feed_forward_length": 80}, r"blk.0.ffn_gate.weight has shape \[72, 96\], its metadata asks"),
    "list of layers": ({"llama.block_count": [1, 1]}, "tensor blk.1.attn_norm.weight has no place in a model"),
    "experts": ({"llama.expert_count": 4, "llama.expert_used_count": 2}, "blk.0.ffn_gate_inp.weight is missing"),
    "gating": (
        {"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.expert_gating_func": 2},
        r"llama.expert_gating_func 2; it must be 1 \(softmax\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_metadata_that_cannot_be(tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    config, tensors = model("llama")
    metadata = {name: item for name, item in {**gguf_metadata(config), **changes}.items() if item is not None}
    path = write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(config, tensors))
    with pytest.raises((WeightsError, ConfigError), match=message) as raised:
        open_checkpoint(path).check()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "mistral4",
            {"mistral4.attention.temperature_length": 8192},
            "8192; it must be 16, the original",
        ),
        (
            "mistral4",
            {"mistral4.attention.temperature_length": None},
            "8192; it must be 16, the original",
        ),
        ("mistral4", {"mistral4.expert_gating_func": 2}, r"expert_gating_func 2; it must be 1 \(softmax\)"),
        ("deepseek_v3", {"deepseek2.attention.temperature_scale": 0.1}, r"it must be 1 \(softmax\)"),
        ("mistral4", {"mistral4.attention.temperature_scale": -0.1}, "llama_4_scaling_beta is -0.1"),
    ],
)
def test_growth_of_queries_that_cannot_be(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    config, tensors = model(family)
    metadata = {name: item for name, item in {**gguf_metadata(config), **changes}.items() if item is not None}
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(config, tensors)))


def test_queries_of_the_older_word_grow_too(tmp_path: Path) -> None:
    """Mistral Large 3 is called deepseek2, with the lengths of its original context."""
    config, tensors = model("mistral4")
    found = {name.replace("mistral4.", "deepseek2."): value for name, value in gguf_metadata(config).items()}
    del found["deepseek2.attention.temperature_length"]
    found |= {"general.architecture": "deepseek2", "deepseek2.rope.scaling.original_context_length": 8192}
    spec = open_checkpoint(write_gguf(tmp_path / "model.gguf", found, gguf_tensors(config, tensors))).spec
    assert (spec.model_type, spec.layers[0].mixer.rope.growth.length) == ("mistral4", 8192)


@pytest.mark.parametrize("kv_heads", [[2, 2], [0, 2, 0, 3], [0, 0, 0, 0], [0.0, 2.0, 0.0, 0.0], "2"])
def test_layers_that_attend_are_those_with_heads(tmp_path: Path, kv_heads: Any) -> None:
    config, tensors = model("lfm2")
    metadata = {**gguf_metadata(config), "lfm2.attention.head_count_kv": kv_heads}
    path = write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(config, tensors))
    with pytest.raises(WeightsError, match=r"head_count_kv .*; it must be (one number above|an integer, or)"):
        open_checkpoint(path)


@pytest.mark.parametrize("layers, scale", [(61, 24**-0.5), (62, 16**-0.5)])
def test_gemma_scales_scores_by_its_heads_but_the_largest_by_its_width(
    tmp_path: Path, layers: int, scale: float
) -> None:
    config, tensors = model("gemma3_text")
    embedding = {"token_embd.weight": tensors["model.embed_tokens.weight"]}
    path = write_gguf(tmp_path / "model.gguf", {**gguf_metadata(config), "gemma3.block_count": layers}, embedding)
    mixer = model_spec(gguf_config(read_gguf(path))).layers[0].mixer
    assert isinstance(mixer, GroupedQueryAttention) and mixer.scale == pytest.approx(scale)


def test_a_final_norm_may_have_another_name(tmp_path: Path) -> None:
    """That of LFM2 is named after the embedding in many files."""
    config, tensors = model("lfm2")
    older = gguf_tensors(config, tensors)
    newer = {name.replace("token_embd_norm", "output_norm"): array for name, array in older.items()}
    one = packed(write_gguf(tmp_path / "one.gguf", gguf_metadata(config), older))
    with one, packed(write_gguf(tmp_path / "other.gguf", gguf_metadata(config), newer)) as other:
        assert older.keys() != newer.keys() and same_stores(one, other)


def test_tensors_that_cannot_be(tmp_path: Path) -> None:
    config, tensors = model("llama")
    plain = gguf_tensors(config, tensors)
    more = {**plain, "blk.0.attn_q_norm.weight": np.ones(24, np.float32)}
    with pytest.raises(WeightsError, match="tensor blk.0.attn_q_norm.weight has no place in a model of its arch"):
        open_checkpoint(write_gguf(tmp_path / "a.gguf", gguf_metadata(config), more)).check()
    unread = {**plain, "blk.0.ffn_up.weight": Blocks("Q8_K", (72, 256), bytes(292 * 72))}
    with pytest.raises(WeightsError, match="blk.0.ffn_up.weight has type Q8_K, which is not read; read are F32"):
        open_checkpoint(write_gguf(tmp_path / "b.gguf", gguf_metadata(config), unread)).check()
    without = {name: array for name, array in plain.items() if name != "token_embd.weight"}
    with pytest.raises(WeightsError, match="tensor token_embd.weight is missing"):
        open_checkpoint(write_gguf(tmp_path / "c.gguf", gguf_metadata(config), without))


def test_experts_without_rows_cannot_be(tmp_path: Path) -> None:
    config, tensors = model("mixtral")
    plain, name = gguf_tensors(config, tensors), "blk.0.ffn_down_exps.weight"
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), {**plain, name: plain[name].reshape(-1)})
    with pytest.raises(
        WeightsError, match=r"tensor blk\.0\.ffn_down\.0\.weight has shape \[\], its metadata asks for \["
    ):
        open_checkpoint(path).check()


def test_stores_are_found_by_content(tmp_path: Path) -> None:
    config, tensors = model("llama")
    path = write_model(tmp_path / "a.gguf", config, tensors)
    found = source_fingerprint(path)
    other = write_model(tmp_path / "b.gguf", config, {**tensors, "model.norm.weight": 2 * tensors["model.norm.weight"]})
    assert found == source_fingerprint(path) != source_fingerprint(other)
    assert is_gguf(path) and not is_gguf(tmp_path)
    assert json.dumps(describe_checkpoint(path)[0])


def test_a_laguna_file_may_tell_of_windows_in_turn_and_of_gates_for_each_value(tmp_path: Path) -> None:
    """Of each four layers the first is without a window, or of as many as the file says."""
    config = {**CONFIGS["laguna"], "gating": "per-element", "num_hidden_layers": 6}
    config |= {"num_attention_heads_per_layer": [4] * 6, "layer_types": None, "mlp_layer_types": None}
    tensors = random_tensors(config)
    metadata = gguf_metadata({**config, "layer_types": ["full_attention"] * 6})
    name = "laguna.attention.sliding_window_pattern"
    for pattern, wanted in ((None, [None, 20, 20, 20, None, 20]), (3, [None, 20, 20, None, 20, 20])):
        told = {key: item for key, item in {**metadata, name: pattern}.items() if item is not None}
        path = write_gguf(tmp_path / f"{pattern}.gguf", told, gguf_tensors(config, tensors))
        mixers = [layer.mixer for layer in open_checkpoint(path).spec.layers]
        assert [mixer.window for mixer in mixers] == wanted  # type: ignore[attr-defined]
        assert [mixer.gate_width for mixer in mixers] == [4 * 24] * 6  # type: ignore[attr-defined]
        assert [mixer.rope.dim for mixer in mixers] == [24 if one else 12 for one in wanted]  # type: ignore[attr-defined]


def test_sarvam_turns_heads_as_far_as_a_file_says_and_shares_whole_experts(tmp_path: Path) -> None:
    """Ling 2.0, which has the same word, turns half."""
    config, tensors = model("sarvam_moe")
    metadata, found = gguf_metadata(config), gguf_tensors(config, tensors)
    half = write_gguf(tmp_path / "half.gguf", {**metadata, "bailingmoe2.rope.dimension_count": 12}, found)
    assert [layer.mixer.rope.dim for layer in open_checkpoint(half).spec.layers] == [12] * 3  # type: ignore[attr-defined]
    metadata["bailingmoe2.expert_shared_feed_forward_length"] = 40
    with pytest.raises(WeightsError, match="feed_forward_length 40; it must be 80, as of expert_shared_count"):
        open_checkpoint(write_gguf(tmp_path / "other.gguf", metadata, found))


def test_solar_open_is_glm_4_5_in_a_file(tmp_path: Path) -> None:
    """Whose heads turn whole, and without norms on them."""
    config, tensors = model("solar_open")
    said = {**gguf_metadata({**config, "model_type": "glm4_moe"}), "glm4moe.rope.dimension_count": config["head_dim"]}
    found = {name.replace("ffn_norm", "post_attention_norm"): a for name, a in gguf_tensors(config, tensors).items()}
    ours = packed(write_gguf(tmp_path / "model.gguf", said, found))
    with ours, packed_checkpoint(write_tensors(tmp_path / "hf", config, tensors)) as theirs:
        assert ours.spec.model_type == "glm4_moe" and same_stores(ours, theirs)
        assert plain(ours.spec.layers[0]) == plain(theirs.spec.layers[0])


def test_hunyuan_3_shares_whole_experts_and_may_call_corrections_as_others_do(tmp_path: Path) -> None:
    config, tensors = model("hy_v3")
    metadata, found = gguf_metadata(config), gguf_tensors(config, tensors)
    assert "blk.1.exp_probs_b" in found
    other = {name.replace("exp_probs_b", "exp_probs_b.bias"): array for name, array in found.items()}
    one = packed(write_gguf(tmp_path / "one.gguf", metadata, found))
    with one, packed(write_gguf(tmp_path / "other.gguf", metadata, other)) as store:
        assert same_stores(one, store)
    with pytest.raises(WeightsError, match="is blk.1.exp_probs_b.bias, which is there under another name"):
        open_checkpoint(write_gguf(tmp_path / "both.gguf", metadata, found | other))
    metadata["hy_v3.expert_shared_feed_forward_length"] = 60
    with pytest.raises(WeightsError, match="shared_feed_forward_length 60; it must be a multiple of .*, 40"):
        open_checkpoint(write_gguf(tmp_path / "third.gguf", metadata, found))
