"""A packed store holds the checkpoint's weights, aligned and checked, and a damaged one does not load."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    DTYPES,
    flip_bit,
    packed,
    random_tensors,
    save_with_transformers,
    write_checkpoint,
    write_tensors,
)
from configs import APART, CONFIGS, STACKED
from dequantised import delta_tensors, kimi_tensors, mamba_tensors, per_head
from safetensors import safe_open

from hybrid.errors import WeightsError
from hybrid.formats import FORMATS
from hybrid.formats import packed as layout
from hybrid.formats.block import round_up
from hybrid.formats.mix import MIXES, PARTS
from hybrid.models.layers.absent import NoFeedForward, NoMixer
from hybrid.models.layers.compressed import CompressedAttention
from hybrid.models.layers.gated_delta import GatedDeltaNet
from hybrid.models.layers.gated_latent import GatedLatentAttention
from hybrid.models.layers.kimi_delta import KimiDeltaAttention
from hybrid.models.layers.latent import LatentAttention
from hybrid.models.layers.mamba2 import Mamba2
from hybrid.models.layers.short_conv import ShortConv
from hybrid.models.tensors import bias_name, in_layer
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.pack import cached_store, pack
from hybrid.weights.store import Store


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [False, True])
def test_every_weight_survives_packing(tmp_path: Path, family: str, dtype: str, fused: bool) -> None:
    source = write_checkpoint(tmp_path / "hf", family, dtype=dtype, fused=fused, shards=2)
    exact = random_tensors(CONFIGS[family], dtype, fused)
    tensors = {name: value.astype(ml_dtypes.bfloat16).astype(np.float32) for name, value in exact.items()}
    with packed(source) as store:
        names = store.spec.names
        assert (_unpacked(store, "embedding", 131, 96) == tensors[names.embedding]).all()
        if not store.spec.tied:
            assert (_unpacked(store, "head", 131, 96) == tensors[names.head]).all()
        if names.final_norm:
            _compare_norm(store, "final_norm", names.final_norm, exact)
        if store.spec.head_bias:
            head = store.spec.head_weight(store.mix)
            bias = exact[bias_name(names.head)].astype("f4")
            assert (store.array(f"{head}_bias") == np.pad(bias, (0, -len(bias) % 16))).all()
        for layer in range(len(store.spec.layers)):
            _compare_mixer(store, layer, tensors, exact)
            _compare_feed_forward(store, layer, tensors, (fused and family not in APART) or family in STACKED)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_transformers_forms_pack_to_the_same_bytes(tmp_path: Path, family: str) -> None:
    pytest.importorskip("torch")
    save_with_transformers(tmp_path / "apart", family)
    save_with_transformers(tmp_path / "fused", family, fused=True, max_shard_size="50KB")
    with packed(tmp_path / "apart") as one, packed(tmp_path / "fused") as other:
        for name in one.tensors:
            assert one.array(name).tobytes() == other.array(name).tobytes(), name


@pytest.mark.parametrize("mix", MIXES)
def test_chunks_of_threads_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: str) -> None:
    changes = {"head_dim": 12, "num_attention_heads": 5, "num_key_value_heads": 1, "moe_intermediate_size": 300}
    source = write_checkpoint(tmp_path / "hf", "qwen3_moe", **changes)
    pack(Checkpoint.open(source), tmp_path / "whole", MIXES[mix])
    _by_threads(monkeypatch)
    pack(Checkpoint.open(source), tmp_path / "chunked", MIXES[mix])
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "chunked" / file.name).read_bytes()


def test_what_a_thread_refuses_late_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, name = random_tensors(CONFIGS["qwen3_moe"]), "model.layers.2.mlp.experts.7.down_proj.weight"
    tensors[name][-1, -1] = np.nan
    checkpoint = Checkpoint.open(write_tensors(tmp_path / "hf", CONFIGS["qwen3_moe"], tensors))
    _by_threads(monkeypatch)
    with pytest.raises(WeightsError, match=f"tensor {name} holds NaN or infinity, weights must be finite") as error:
        pack(checkpoint, tmp_path / "store", MIXES["int8"])
    assert "\n" not in str(error.value) and not (tmp_path / "store/manifest.json").exists()


def _by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack every tensor so, in the smallest chunks."""
    monkeypatch.setattr("hybrid.weights.content.CHUNK_BYTES", 1)
    monkeypatch.setattr("hybrid.weights.content.SMALL_BYTES", 0)


def test_an_expert_is_the_blob_of_the_layout(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "hf", "qwen3_moe"))
    with packed(tmp_path / "hf") as store:
        prefix = "model.layers.2.mlp.experts.4."
        matrices = (checkpoint.read(f"{prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
        expected = layout.pack_expert("bf16", *matrices)
        assert (store.array("layers.2.ffn.experts")[4] == expected).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_files_are_plain_safetensors(tmp_path: Path, family: str) -> None:
    with packed(write_checkpoint(tmp_path / "hf", family)) as store:
        found = {}
        for file in store.path.glob("*.safetensors"):
            with safe_open(file, "numpy") as reader:
                found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        for name, tensor in store.tensors.items():
            assert found[name].tobytes() == store.array(name).tobytes()
            assert found[name].shape == tensor.shape


@pytest.mark.parametrize("family", CONFIGS)
def test_tensors_are_aligned_and_read_only(tmp_path: Path, family: str) -> None:
    with packed(write_checkpoint(tmp_path / "hf", family)) as store:
        for name, tensor in store.tensors.items():
            array = store.array(name)
            assert store.address(name) % 64 == 0
            assert array.dtype == {"U8": np.uint8, "F32": np.float32}[tensor.dtype]
            assert array.nbytes == tensor.nbytes
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_a_store_needs_nothing_else(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "hf", "llama")
    companions = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for name in companions:
        (source / name).write_text(name)
    expected = Checkpoint.open(source).spec
    pack(Checkpoint.open(source), tmp_path / "store")
    for file in source.iterdir():
        file.unlink()
    with Store.open(tmp_path / "store") as store:
        assert store.spec == expected and store.format == "bf16"
        assert store.nbytes == sum(tensor.nbytes for tensor in expected.store_tensors(store.mix))
    assert {name: (tmp_path / "store" / name).read_text() for name in companions} == {n: n for n in companions}
    with cached_store(tmp_path / "store", tmp_path / "cache") as store:
        assert store.path == tmp_path / "store" and not (tmp_path / "cache").exists()


def _change_manifest(**changes: Any) -> Callable[[Path], object]:
    """Change the manifest and give it the right checksum again."""

    def damage(path: Path) -> None:
        body = json.loads((path / "manifest.json").read_text()) | changes
        del body["checksum"]
        body["checksum"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        (path / "manifest.json").write_text(json.dumps(body))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "it has no manifest.json"),
    "manifest not JSON": (lambda p: (p / "manifest.json").write_text("{"), "not valid JSON"),
    "of another kind": (_change_manifest(kind="other"), "kind must be 'hybrid-store'"),
    "other layout": (_change_manifest(layout_version=99), "layout version 99, this program reads 5: pack the model"),
    "other format": (_change_manifest(mix={"head": "int2"}), "formats {'head': 'int2'}"),
    "unknown format": (
        _change_manifest(mix=dict.fromkeys(PARTS, "int2")), "format 'int2' of experts is unknown; allowed: bf16",
    ),
    "manifest changed": (lambda p: flip_bit(p / "manifest.json", 40), "checksum is wrong|not valid JSON|kind"),
    "other tensors": (_change_manifest(tensors={}), "other tensors"),
    "shard missing": (lambda p: (p / "outer.safetensors").unlink(), "outer.safetensors: cannot be read"),
    "shard cut": (lambda p: os.truncate(p / "outer.safetensors", 1000), "has 1000 bytes, the manifest says"),
    "header changed": (lambda p: flip_bit(p / "layer-00001.safetensors", 20), "layer-00001.safetensors"),
    "weights changed": (
        lambda p: flip_bit(p / "layer-00001.safetensors", -100), "tensor layers.1.ffn.experts has a wrong checksum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    packed(write_checkpoint(tmp_path / "hf", "qwen3_moe")).close()
    damage, message = DAMAGE[kind]
    damage(tmp_path / "hf-store")
    with pytest.raises(WeightsError, match=message) as error:
        Store.open(tmp_path / "hf-store")
    assert "\n" not in str(error.value)


def test_large_stores_are_verified_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(write_checkpoint(tmp_path / "hf", "qwen3_moe")).close()
    flip_bit(tmp_path / "hf-store/layer-00001.safetensors", -100)
    monkeypatch.setattr("hybrid.weights.store.ALWAYS_VERIFIED", 0)
    Store.open(tmp_path / "hf-store").close()
    with pytest.raises(WeightsError, match="layers.1.ffn.experts"):
        Store.open(tmp_path / "hf-store", check=True)


def _unpacked(store: Store, name: str, n: int, k: int) -> np.ndarray:
    return FORMATS[store.tensors[name].format or ""].unpack(store.array(name), n, k)


def _compare_norm(store: Store, name: str, source: str, exact: dict[str, Any]) -> None:
    place = store.spec.place(0, store.mix)
    assert (store.array(name) == exact[source].astype("f4") + np.float32(place.norm_plus)).all()
    if place.norm == "layer":
        assert (store.array(f"{name}_bias") == exact[bias_name(source)].astype("f4")).all()


def _compare_mixer(store: Store, layer: int, tensors: dict[str, Any], exact: dict[str, Any]) -> None:
    if isinstance(store.spec.layers[layer].mixer, NoMixer):
        return
    if isinstance(store.spec.layers[layer].mixer, ShortConv):
        return _compare_conv(store, layer, tensors, exact)
    if isinstance(store.spec.layers[layer].mixer, LatentAttention):
        return _compare_latent(store, layer, tensors, exact)
    if isinstance(store.spec.layers[layer].mixer, GatedDeltaNet):
        return _compare_delta(store, layer, tensors, exact)
    if isinstance(store.spec.layers[layer].mixer, Mamba2):
        return _compare_mamba(store, layer, tensors, exact)
    if isinstance(store.spec.layers[layer].mixer, KimiDeltaAttention):
        return _compare_kimi_delta(store, layer, tensors, exact)
    if isinstance(store.spec.layers[layer].mixer, CompressedAttention):
        return _compare_compressed(store, layer, tensors, exact)
    prefix, attention = f"layers.{layer}.attention.", store.spec.layers[layer].mixer
    names = in_layer(attention.names, layer)
    apart = (names.qkv,) if names.qkv else (names.q, names.k, names.v)[: 2 if attention.keys_are_values else 3]
    apart += (names.gate,) if attention.gate_width else ()
    stacked = np.concatenate([tensors[name] for name in apart])
    assert (_unpacked(store, f"{prefix}qkv", *stacked.shape) == stacked).all()
    out = tensors[names.out]
    assert (_unpacked(store, f"{prefix}out", *out.shape) == out).all()
    for part, name in (("norm", names.norm), ("post_norm", names.post_norm)):
        if name:
            _compare_norm(store, prefix + part, name, exact)
        else:
            assert prefix + part not in store.tensors
    if attention.qk_norm != "none":
        plus = np.float32(store.spec.place(layer, store.mix).norm_plus)
        for mine, theirs in (("q_norm", names.q_norm), ("k_norm", names.k_norm)):
            assert (store.array(prefix + mine) == exact[theirs].astype("f4") + plus).all()
    if attention.qkv_bias:
        found, biased = store.array(f"{prefix}qkv_bias"), [names.q, names.k, names.v]
        if attention.out_bias:
            found, biased = np.concatenate([found, store.array(f"{prefix}out_bias")]), [*biased, names.out]
        biases = [exact[name.replace(".weight", ".bias")] for name in biased]
        assert (found == np.concatenate(biases).astype("f4")).all()


def _compare_latent(store: Store, layer: int, tensors: dict[str, Any], exact: dict[str, Any]) -> None:
    prefix, latent = f"layers.{layer}.attention.", store.spec.layers[layer].mixer
    names, heads, rank = in_layer(latent.names, layer), latent.heads, latent.rank
    low = np.concatenate([tensors[names.q_down if latent.q_rank else names.q], tensors[names.kv_down]])
    whole = {"low": low, "out": tensors[names.out]} | ({"q_up": tensors[names.q_up]} if latent.q_rank else {})
    for part, matrix in whole.items():
        assert (_unpacked(store, prefix + part, *matrix.shape) == matrix).all()
    up = tensors[names.kv_up].reshape(heads, -1, rank)
    keys = per_head(store, f"{prefix}keys", heads, rank, latent.nope_dim)
    assert (keys == up[:, : latent.nope_dim].transpose(0, 2, 1)).all()
    assert (per_head(store, f"{prefix}values", heads, latent.value_dim, rank) == up[:, latent.nope_dim :]).all()
    norms = {"norm": names.norm, "kv_norm": names.kv_norm} | ({"q_norm": names.q_norm} if latent.q_rank else {})
    if isinstance(latent, GatedLatentAttention):
        norms["gates"] = latent.gates.replace("{layer}", str(layer))
    for part, name in norms.items():
        assert (store.array(prefix + part) == exact[name].astype("f4")).all()


def _compare_delta(store: Store, layer: int, tensors: dict[str, Any], exact: dict[str, Any]) -> None:
    delta = store.spec.layers[layer].mixer
    names = in_layer(delta.names, layer)
    packed = {names.grouped, names.q, names.k, names.v, names.qkv, names.gates, names.out}
    found = dict(delta_tensors(store, layer))
    assert len(found) == (8 if names.grouped else 14 if names.q else 10) - (not names.norm)
    if names.norm:
        _compare_norm(store, f"layers.{layer}.delta.norm", names.norm, exact)
        del found[names.norm]
    for name, values in found.items():
        wanted = tensors[name] if name in packed else exact[name].astype("f4")
        assert values.shape == wanted.shape and (values == wanted).all(), name


def _compare_mamba(store: Store, layer: int, tensors: dict[str, Any], exact: dict[str, Any]) -> None:
    mamba = store.spec.layers[layer].mixer
    names, found = in_layer(mamba.names, layer), dict(mamba_tensors(store, layer))
    assert len(found) == 9
    _compare_norm(store, f"layers.{layer}.mamba.norm", names.norm, exact)
    gates_and_convolved = slice(mamba.width)
    assert (found[names.into][gates_and_convolved] == tensors[names.into][gates_and_convolved]).all()
    assert (found[names.into][mamba.width :] == exact[names.into][mamba.width :].astype("f4")).all()
    assert (found[names.out] == tensors[names.out]).all()
    for name in found.keys() - {names.norm, names.into, names.out}:
        assert found[name].shape == exact[name].shape and (found[name] == exact[name].astype("f4")).all(), name


def _compare_kimi_delta(store: Store, layer: int, tensors: dict[str, Any], exact: dict[str, Any]) -> None:
    delta, found = store.spec.layers[layer].mixer, dict(kimi_tensors(store, layer))
    names = in_layer(delta.names, layer)
    packed = {names.q, names.k, names.v, names.decays, names.gates, names.decays_down, names.gates_down, names.out}
    assert len(found) == (16 if delta.rank else 14)
    for name, values in found.items():
        wanted = tensors[name] if name in packed else exact[name].astype("f4")
        assert values.shape == wanted.shape and (values == wanted).all(), name


def _compare_compressed(store: Store, layer: int, tensors: dict[str, Any], exact: dict[str, Any]) -> None:
    """And the streams around it, and the experts that tokens have."""
    prefix, spec = f"layers.{layer}.", store.spec
    half, mixer = spec.layers[layer].feed_forward, spec.layers[layer].mixer
    names, router = in_layer(mixer.names, layer), in_layer(half.names, layer)
    matrices = {"attention.low": (names.q_down, names.kv), "attention.q_up": (names.q_up,)}
    matrices |= {"attention.out_down": (names.out_down,), "attention.out": (names.out_up,)}
    floats = {"attention.norm": names.norm, "attention.q_norm": names.q_norm, "attention.kv_norm": names.kv_norm}
    floats |= {"attention.sinks": names.sinks, "ffn.norm": router.norm}
    if mixer.compressors:
        matrices["compressor.in"] = tuple(name for one in mixer.compressors for name in one.sources(layer))
    for compressor in mixer.compressors:
        own = in_layer(compressor.names, layer)
        floats |= {f"{compressor.stored}.bias": own.bias, f"{compressor.stored}.norm": own.norm}
    if mixer.indexer:
        own = in_layer(mixer.indexer.names, layer)
        matrices["indexer.q"], floats["indexer.weights"] = (own.q,), own.weights
    if half.router.by_token:
        floats["ffn.router_by_token"] = router.by_token
    else:
        floats["ffn.router_correction"] = router.correction
    for part, streams in (("mixer", spec.streams.mixer), ("ffn", spec.streams.feed_forward)):
        own = in_layer(streams, layer)
        floats |= {f"{part}_streams.{name}": getattr(own, name) for name in ("matrix", "base", "scale")}
    for name, sources in matrices.items():
        whole = np.concatenate([tensors[source] for source in sources])
        assert (_unpacked(store, prefix + name, *whole.shape) == whole).all(), name
    for name, source in floats.items():
        assert (store.array(prefix + name).reshape(exact[source].shape) == exact[source].astype("f4")).all(), name


def _compare_conv(store: Store, layer: int, tensors: dict[str, Any], exact: dict[str, Any]) -> None:
    prefix, conv = f"layers.{layer}.conv.", store.spec.layers[layer].mixer
    names = in_layer(conv.names, layer)
    for part, name in (("in", names.into), ("out", names.out)):
        assert (_unpacked(store, prefix + part, *tensors[name].shape) == tensors[name]).all()
    for part, name in (("norm", names.norm), ("taps", names.taps)):
        assert (store.array(prefix + part).reshape(-1) == exact[name].astype("f4").reshape(-1)).all()
    assert (f"{prefix}taps_bias" in store.tensors) == conv.bias
    for part, name in (
        (("in_bias", names.into), ("taps_bias", names.taps), ("out_bias", names.out)) if conv.bias else ()
    ):
        bias = exact[name.replace(".weight", ".bias")].astype("f4")
        assert (store.array(prefix + part)[: len(bias)] == bias).all()


def _compare_feed_forward(store: Store, layer: int, tensors: dict[str, Any], fused: bool) -> None:
    ffn, hidden = store.spec.layers[layer].feed_forward, store.spec.hidden
    if isinstance(ffn, NoFeedForward):
        return
    names = in_layer(ffn.names, layer)
    blobs = store.array(f"layers.{layer}.ffn.experts")
    bf16, down_start = FORMATS["bf16"], layout.down_offset("bf16", hidden, ffn.intermediate, ffn.wide)
    for expert in range(max(1, ffn.experts)):
        gate, up, down = _expert(store, layer, expert, tensors, fused and ffn.is_moe)
        blocks = blobs[expert, :down_start].reshape(-1, ffn.wide, bf16.block_bytes(round_up(hidden, 64)))
        assert (bf16.unpack(blocks[:, 0], ffn.intermediate, hidden) == gate).all()
        assert (bf16.unpack(blocks[:, -1], ffn.intermediate, hidden) == up).all()
        assert (bf16.unpack(blobs[expert, down_start:], hidden, ffn.intermediate) == down).all()
    if ffn.is_moe:
        name = names.fused_router if fused else names.router
        assert store.array(f"layers.{layer}.ffn.router").shape == (ffn.experts + ffn.shared_gate, hidden)
        router = store.array(f"layers.{layer}.ffn.router").astype(ml_dtypes.bfloat16).astype("f4")
        assert (router[: ffn.experts] == tensors[name]).all()
        if ffn.shared_gate:
            assert (router[ffn.experts :] == tensors[names.shared_gate]).all()


def _expert(store: Store, layer: int, expert: int, tensors: dict[str, Any], fused: bool) -> tuple[Any, Any, Any]:
    ffn = store.spec.layers[layer].feed_forward
    names = in_layer(ffn.names.experts if ffn.is_moe else ffn.names.dense, layer)
    if ffn.wide == 1:  # up alone, in the place of both
        wide = (names.fused_gate_up, names.fused_down) if fused else names.of_expert(expert)[1:]
        up, down = (tensors[name][expert] if fused else tensors[name] for name in wide)
        return up, up, down
    if not ffn.is_moe and not names.gate:
        return *np.split(tensors[names.fused_gate_up], 2), tensors[names.fused_down]
    if fused:
        both, down = (tensors[name][expert] for name in (names.fused_gate_up, names.fused_down))
        if names.fused_transposed:
            both, down = both.T, down.T
        gate, up = (both[0::2], both[1::2]) if names.fused_alternate else np.split(both, 2)
        return gate, up, down
    gate, up, down = (tensors[name] for name in names.of_expert(expert))
    return gate, up, down
