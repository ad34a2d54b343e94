"""Latent attention in GGUF files, which have the matrices of heads in one tensor or as they are multiplied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import packed as packed_checkpoint
from checkpoints import random_tensors, write_tensors
from dequantised import write_dequantised
from gguf_rig import Blocks, gguf_metadata, gguf_tensors, write_gguf
from safetensors.numpy import load_file
from steps import in_chunks, open_engine
from test_gguf_models import in_blocks, model, packed, same_stores
from test_gguf_outline import cut, splits

from hybrid import LLM
from hybrid.errors import WeightsError
from hybrid.formats.mix import MIXES, FormatMix, parse_mix
from hybrid.models.layers.indexer import index_format
from hybrid.weights.checkpoints.gguf import GgufCheckpoint
from hybrid.weights.checkpoints.gguf_blocks import values
from hybrid.weights.checkpoints.gguf_outline import outline_gguf
from hybrid.weights.checkpoints.opening import open_checkpoint
from hybrid.weights.manifest import MANIFEST, Manifest
from hybrid.weights.pack import pack
from hybrid.weights.store import Store

SIZES = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 256,
    "qk_nope_head_dim": 96, "v_head_dim": 64, "tie_word_embeddings": False,
}  # fmt: skip
PROJECTIONS = dict.fromkeys(("attn_q_a", "attn_kv_a_mqa", "attn_q_b", "attn_output"), "Q4_K")
TYPES = {**PROJECTIONS, "attn_k_b": "Q5_0", "attn_v_b": "Q4_K"}


def in_types(family: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Blocks | np.ndarray]]:
    """The config, metadata and tensors of a model in types that differ between projections and matrices of heads."""
    config = model(family)[0] | SIZES | changes
    plain = gguf_tensors(config, random_tensors(config))
    blocks = {name: in_blocks(name, array, TYPES.get(name.split(".")[-2])) for name, array in plain.items()}
    return config, gguf_metadata(config), blocks


def test_keys_and_values_of_latents_in_one_tensor(tmp_path: Path) -> None:
    """As older files have them."""
    config, tensors = model("deepseek_v3")
    plain = gguf_tensors(config, tensors)
    older = {name: array for name, array in plain.items() if name.split(".")[-2] not in ("attn_k_b", "attn_v_b")}
    for layer in range(config["num_hidden_layers"]):
        older[f"blk.{layer}.attn_kv_b.weight"] = tensors[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
    lengths = {
        "key_length": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "value_length": config["v_head_dim"],
    }
    metadata = {name: item for name, item in gguf_metadata(config).items() if not name.endswith("_mla")}
    metadata |= {f"deepseek2.attention.{name}": length for name, length in lengths.items()}
    one = packed(write_gguf(tmp_path / "one.gguf", gguf_metadata(config), plain))
    with one, packed(write_gguf(tmp_path / "other.gguf", metadata, older)) as other:
        assert same_stores(one, other)


def test_matrices_of_heads_keep_their_types(tmp_path: Path) -> None:
    """Newer files have them as they are multiplied, and so they are packed, and multiplied."""
    _, metadata, blocks = in_types("deepseek_v3")
    path = write_gguf(tmp_path / "model.gguf", metadata, blocks)
    pack(open_checkpoint(path), tmp_path / "store")
    with Store.open(tmp_path / "store", check=True) as store:
        assert (store.mix.of_layer(0).attention, store.mix.of_layer(0).per_head) == ("q4_k", "q5_0/q4_k")
        dequantised = write_dequantised(tmp_path / "plain", store)
    kv = load_file(dequantised / "model.safetensors")["model.layers.0.self_attn.kv_b_proj.weight"]
    keys, of_values = np.split(kv.reshape(4, 96 + 64, 256), [96], axis=1)
    for name, found in (("attn_k_b", keys.swapaxes(1, 2)), ("attn_v_b", of_values)):
        tensor = blocks[f"blk.0.{name}.weight"]
        assert isinstance(tensor, Blocks)
        rows = np.frombuffer(tensor.data, np.uint8).reshape(int(np.prod(tensor.shape[:-1])), -1)
        np.testing.assert_array_equal(found, values(tensor.type, rows).reshape(tensor.shape))
    tokens = [5, 17, 40, 3, 99]
    with LLM(tmp_path / "store", threads=1) as llm, LLM(dequantised, cache_dir=tmp_path, threads=1) as exact:
        expected, other = exact.logits(tokens), exact.logits(tokens[::-1])
        error = np.linalg.norm(llm.logits(tokens) - expected) / np.linalg.norm(expected)
    assert error < 0.05 < 0.3 < np.linalg.norm(other - expected) / np.linalg.norm(expected)


def test_layers_that_are_not_here_have_the_types_of_heads_of_those_that_are(tmp_path: Path) -> None:
    """Whether the cut is between two layers or between the two matrices of one."""
    _, metadata, blocks = in_types("deepseek_v3")
    metadata["tokenizer.ggml.tokens"] = ["a"] * blocks["token_embd.weight"].shape[0]
    whole = GgufCheckpoint.open(write_gguf(tmp_path / "whole.gguf", metadata, blocks))
    assert whole.native.per_head == "q5_0/q4_k"
    for away in ("blk.2.", "blk.2.attn_v_b", "blk.2.attn_k_b", "blk.0.attn_k_b"):
        here, other = splits(tmp_path, metadata, blocks, [name for name in blocks if not name.startswith(away)])
        other.unlink()
        assert outline_gguf(cut(here)).native == whole.native, away
    here, other = splits(tmp_path, metadata, blocks, [name for name in blocks if "attn_v_b" not in name])
    other.unlink()
    outline = outline_gguf(cut(here))
    assert outline.native is None and "so the formats of the file are not known" in outline.notes[0]


def test_an_indexer_has_the_format_of_projections(tmp_path: Path) -> None:
    _, metadata, blocks = in_types("deepseek_v32")
    native = GgufCheckpoint.open(write_gguf(tmp_path / "model.gguf", metadata, blocks)).native
    assert (native.attention, native.per_head, index_format(native)) == ("q4_k", "q5_0/q4_k", "q8_0")


def test_layers_without_such_matrices_do_not_differ_by_them(tmp_path: Path) -> None:
    """Of Kimi Linear most layers have no latents."""
    config = model("kimi_linear")[0] | {"qk_nope_head_dim": 32}
    plain = gguf_tensors(config, random_tensors(config))
    blocks = {name: in_blocks(name, array, "Q8_0" if "attn_k_b" in name else None) for name, array in plain.items()}
    native = GgufCheckpoint.open(write_gguf(tmp_path / "model.gguf", gguf_metadata(config), blocks)).native
    assert (native.per_head, native.layers) == ("q8_0/bf16", ())


def test_a_device_takes_them(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config, metadata, blocks = in_types("deepseek_v3")
    pack(open_checkpoint(write_gguf(tmp_path / "model.gguf", metadata, blocks)), tmp_path / "store")
    tokens = np.arange(40) % config["vocab_size"]
    logits = []
    for choices in ({"device": "cpu"}, {"device": "simulated", "step_on": "torch-cpu"}):
        with open_engine(tmp_path / "store", tmp_path / "cache", **choices) as engine:
            logits.append(in_chunks(engine, tokens, 16).copy())
    assert 0 < np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]) < 0.05


def test_they_are_kept_told_and_changed_with_attention(tmp_path: Path) -> None:
    mix = FormatMix("q4_k", "q4_k", "q4_k", "q4_k", "q6_k", per_head="q5_0/q4_k")
    assert str(mix) == "head q6_k, matrices of heads q5_0/q4_k, rest q4_k"
    layers = FormatMix.of_layers([mix, MIXES["q4_k"], mix])
    for kept in (mix, layers):
        Manifest(kept, {}, "", {}, {}).write(tmp_path / MANIFEST)
        assert Manifest.read(tmp_path / MANIFEST).mix == kept
    assert parse_mix("head=bf16", mix).per_head == mix.per_head
    assert parse_mix("attention=int8", layers).per_head == "" == parse_mix("int4", mix).per_head


def test_values_of_latents_in_a_tensor_of_their_own_must_be_of_a_type_that_is_read(tmp_path: Path) -> None:
    config, tensors = model("deepseek_v3")
    plain, name = gguf_tensors(config, tensors), "blk.0.attn_v_b.weight"
    found = {**plain, name: plain[name].astype(np.int32)}
    path = write_gguf(tmp_path / "model.gguf", gguf_metadata(config), found)
    with pytest.raises(WeightsError, match=f"tensor {name} has type I32, which is not read"):
        open_checkpoint(path).check()


def test_glm_4_7_flash_is_deepseek_v3_in_a_file(tmp_path: Path) -> None:
    """With a layer that predicts further tokens behind the others, and without a word for its sigmoids."""
    config, tensors = model("glm4_moe_lite")
    said = {**gguf_metadata({**config, "model_type": "deepseek_v3"}), "deepseek2.block_count": 4}
    del said["deepseek2.expert_gating_func"]
    found = gguf_tensors(config, tensors)
    more = {"blk.3.nextn.eh_proj.weight": np.zeros((96, 192), np.float32)}
    file = write_gguf(tmp_path / "model.gguf", {**said, "deepseek2.nextn_predict_layers": 1}, found | more)
    assert open_checkpoint(file).spec.model_type == "deepseek_v3"
    assert same_stores(packed(file), packed_checkpoint(write_tensors(tmp_path / "hf", config, tensors)))
