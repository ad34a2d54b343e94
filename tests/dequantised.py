"""A checkpoint of what a packed store stands for: what the quantisation of weights costs is in it, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from checkpoints import write_tensors
from configs import CONFIGS, STACKED

from hybrid.formats import FORMATS
from hybrid.formats.packed import down_offset, matrix_formats
from hybrid.models.layers.absent import NoFeedForward, NoMixer
from hybrid.models.layers.block_selected import BlockSelectedAttention
from hybrid.models.layers.gated_delta import GatedDeltaNet
from hybrid.models.layers.gated_latent import GatedLatentAttention
from hybrid.models.layers.indexed import IndexedAttention
from hybrid.models.layers.kimi_delta import KimiDeltaAttention
from hybrid.models.layers.latent import LatentAttention
from hybrid.models.layers.mamba2 import Mamba2
from hybrid.models.layers.short_conv import ShortConv
from hybrid.models.spec import LayerSpec
from hybrid.models.tensors import Gated, in_layer
from hybrid.weights.pack import model_config
from hybrid.weights.store import Store

Named = Iterator[tuple[str, np.ndarray]]
# Families whose tensors are known here.
_OTHERS = ("gemma4_text", "deepseek_v4", "glm5_next_text", "qwen4_exp_text")
WRITTEN = [family for family in CONFIGS if family not in _OTHERS]


def write_dequantised(path: Path, store: Store) -> Path:
    """A float32 checkpoint directory with the values of the store; its head stands apart even if the model is tied."""
    config = model_config(store.path) | {"tie_word_embeddings": False, "torch_dtype": "float32", "dtype": "float32"}
    config.pop("quantization_config", None)
    tensors = dict(_outer(store))
    for index in range(len(store.spec.layers)):
        mixer = _MIXERS.get(type(store.spec.layers[index].mixer), _attention)
        tensors |= dict(mixer(store, index)) | dict(_feed_forward(store, index))
    return write_tensors(path, config, {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def _matrix(store: Store, name: str, n: int, k: int) -> np.ndarray:
    format = store.tensors[name].format
    assert format is not None
    return FORMATS[format].unpack(store.array(name), n, k)


def _side_by_side(store: Store, name: str, rows: dict[str, int], bias: bool = False) -> Named:
    """What was stacked in one matrix, or in several where formats differ. rows: of each source."""
    for found, tensor in store.tensors.items():
        if found == name or (found.startswith(f"{name}_") and tensor.format):
            sizes = [rows[source] for source in tensor.origin.names]
            whole, ends = _matrix(store, found, sum(sizes), store.spec.hidden), np.cumsum(sizes[:-1])
            yield from zip(tensor.origin.names, np.split(whole, ends), strict=True)
            if bias:
                biases = np.split(store.array(f"{found}_bias")[: sum(sizes)], ends)
                yield from zip(map(_bias, tensor.origin.names), biases, strict=True)


def _outer(store: Store) -> Named:
    spec, names = store.spec, store.spec.names
    yield names.embedding, _matrix(store, "embedding", spec.vocab, spec.hidden)
    head = "head" if "head" in store.tensors else "embedding"
    yield names.head, _matrix(store, head, spec.vocab, spec.hidden)
    yield from _norm(store, "final_norm", names.final_norm)
    if spec.head_bias:
        yield _bias(names.head), store.array(f"{head}_bias")[: spec.vocab]


def _norm(store: Store, name: str, source: str) -> Named:
    """As the checkpoint has it, if it has one."""
    if not source:
        return
    place = store.spec.place(0, store.mix)
    yield source, store.array(name) - np.float32(place.norm_plus)
    if place.norm == "layer":
        yield _bias(source), store.array(f"{name}_bias")


def _attention(store: Store, index: int) -> Named:
    spec, prefix = store.spec, f"layers.{index}.attention"
    attention = spec.layers[index].mixer
    names = in_layer(attention.names, index)
    yield from _norm(store, f"{prefix}.norm", names.norm)
    if names.post_norm:
        yield from _norm(store, f"{prefix}.post_norm", names.post_norm)
    parts, sizes = [names.q, names.k, names.v], [attention.query_width, attention.kv_width, attention.values_width]
    if attention.gate_width:
        parts, sizes = [*parts, names.gate], [*sizes, attention.gate_width]
    if names.qkv:
        parts, sizes = [names.qkv], [attention.qkv_width]
    yield from _side_by_side(store, f"{prefix}.qkv", dict(zip(parts, sizes, strict=True)), attention.qkv_bias)
    out = names.out
    yield out, _matrix(store, f"{prefix}.out", spec.hidden, attention.width)
    if attention.out_bias:
        yield _bias(out), store.array(f"{prefix}.out_bias")[: spec.hidden]
    if attention.qk_norm != "none":
        plus = np.float32(spec.place(index, store.mix).norm_plus)
        yield names.q_norm, store.array(f"{prefix}.q_norm") - plus
        yield names.k_norm, store.array(f"{prefix}.k_norm") - plus
    if attention.sinks:
        yield names.sinks, store.array(f"{prefix}.sinks")


def _conv(store: Store, index: int) -> Named:
    spec, prefix, conv = store.spec, f"layers.{index}.conv", store.spec.layers[index].mixer
    names, width = in_layer(conv.names, index), conv.width
    yield names.norm, store.array(f"{prefix}.norm")
    yield names.into, _matrix(store, f"{prefix}.in", 3 * width, spec.hidden)
    yield names.taps, store.array(f"{prefix}.taps").reshape(width, 1, conv.taps)
    yield names.out, _matrix(store, f"{prefix}.out", spec.hidden, width)
    if conv.bias:
        sizes = {"in": (names.into, 3 * width), "taps": (names.taps, width), "out": (names.out, spec.hidden)}
        for part, (name, size) in sizes.items():
            yield _bias(name), store.array(f"{prefix}.{part}_bias")[:size]


def _latent(store: Store, index: int) -> Named:
    spec, prefix, latent = store.spec, f"layers.{index}.attention", store.spec.layers[index].mixer
    names, out = in_layer(latent.names, index), latent.width
    first = names.q_down if latent.q_rank else names.q
    yield names.norm, store.array(f"{prefix}.norm")
    low = dict(zip((first, names.kv_down), latent.low_parts, strict=True))
    yield from _side_by_side(store, f"{prefix}.low", low, latent.bias)
    if latent.q_rank:
        yield names.q_norm, store.array(f"{prefix}.q_norm")
        yield names.q_up, _matrix(store, f"{prefix}.q_up", latent.query_width, latent.q_rank)
    yield names.kv_norm, store.array(f"{prefix}.kv_norm")
    keys = per_head(store, f"{prefix}.keys", latent.heads, latent.rank, latent.nope_dim).transpose(0, 2, 1)
    values = per_head(store, f"{prefix}.values", latent.heads, latent.value_dim, latent.rank)
    yield names.kv_up, np.concatenate([keys, values], axis=1).reshape(-1, latent.rank)
    yield names.out, _matrix(store, f"{prefix}.out", spec.hidden, out)
    if latent.bias:
        yield _bias(names.out), store.array(f"{prefix}.out_bias")[: spec.hidden]


def _gated_latent(store: Store, index: int) -> Named:
    yield from _latent(store, index)
    gates = store.spec.layers[index].mixer.gates.replace("{layer}", str(index))
    yield gates, store.array(f"layers.{index}.attention.gates")


def _indexed(store: Store, index: int) -> Named:
    yield from _latent(store, index)
    if not (indexer := store.spec.layers[index].mixer.indexer):
        return
    prefix, names = f"layers.{index}.indexer", in_layer(indexer.names, index)
    yield names.q, _matrix(store, f"{prefix}.q", indexer.width, indexer.q_rank)
    yield names.k, _matrix(store, f"{prefix}.k", indexer.head_dim, store.spec.hidden)
    yield names.k_norm, store.array(f"{prefix}.norm")
    yield _bias(names.k_norm), store.array(f"{prefix}.norm_bias")
    yield names.weights, store.array(f"{prefix}.weights")


def delta_tensors(store: Store, index: int) -> Named:
    """Of a layer of the gated delta rule."""
    spec, prefix, delta = store.spec, f"layers.{index}.delta", store.spec.layers[index].mixer
    names, hidden = in_layer(delta.names, index), spec.hidden
    yield from _norm(store, f"{prefix}.norm", names.norm)
    keys, values, heads = delta.key_width, delta.value_width, delta.value_heads
    decays = np.split(store.array(f"{prefix}.decays").reshape(-1, hidden), [heads])
    if names.grouped:
        projected = np.split(_matrix(store, f"{prefix}.in", delta.width, hidden), np.cumsum([keys, keys, values]))
        yield names.grouped, _by_key_head(projected, delta.key_heads)
        yield names.grouped_decays, _by_key_head(decays, delta.key_heads)
    else:
        apart = {names.q: keys, names.k: keys, names.v: values} if names.q else {names.qkv: delta.channels}
        yield from _side_by_side(store, f"{prefix}.in", {**apart, names.gates: values})
        yield from zip((names.betas, names.decays), decays, strict=True)
    taps = store.array(f"{prefix}.taps").reshape(-1, 1, delta.taps)
    if names.q:
        yield from zip((names.q_taps, names.k_taps, names.v_taps), np.split(taps, [keys, 2 * keys]), strict=True)
    else:
        yield names.taps, taps
    for name, part in (
        (names.decay_rate, "decay_rate"),
        (names.decay_bias, "decay_bias"),
        (names.head_norm, "head_norm"),
    ):
        yield name, store.array(f"{prefix}.{part}")
    yield names.out, _matrix(store, f"{prefix}.out", hidden, values)


def kimi_tensors(store: Store, index: int) -> Named:
    """Of a layer of Kimi Delta Attention."""
    prefix, delta = f"layers.{index}.delta", store.spec.layers[index].mixer
    names, width = in_layer(delta.names, index), delta.width
    low = (names.decays_down, names.gates_down) if delta.rank else (names.decays, names.gates)
    yield names.norm, store.array(f"{prefix}.norm")
    rows = dict.fromkeys((names.q, names.k, names.v), width) | dict.fromkeys(low, delta.low)
    yield from _side_by_side(store, f"{prefix}.in", rows)
    if delta.rank:
        yield names.decays, _matrix(store, f"{prefix}.decays", width, delta.rank)
        yield names.gates, _matrix(store, f"{prefix}.gates", width, delta.rank)
    yield from zip(names.taps, np.split(store.array(f"{prefix}.taps").reshape(-1, 1, delta.taps), 3), strict=True)
    yield names.betas, store.array(f"{prefix}.betas")
    yield names.decay_rate, store.array(f"{prefix}.decay_rate").reshape(delta.rates)
    yield names.decay_bias, store.array(f"{prefix}.decay_bias")
    yield names.head_norm, store.array(f"{prefix}.head_norm")
    yield names.out, _matrix(store, f"{prefix}.out", store.spec.hidden, width)


def _by_key_head(parts: list[np.ndarray], heads: int) -> np.ndarray:
    """The rows of all parts that belong to the first key head, then those of the next."""
    hidden = parts[0].shape[-1]
    return np.concatenate([part.reshape(heads, -1, hidden) for part in parts], axis=1).reshape(-1, hidden)


def per_head(store: Store, name: str, heads: int, n: int, k: int) -> np.ndarray:
    """The matrices [heads, n, k] of heads, which lie behind each other."""
    format = FORMATS[store.tensors[name].format or ""]
    return np.stack([format.unpack(blocks, n, k) for blocks in store.array(name).reshape(heads, -1)])


def mamba_tensors(store: Store, index: int) -> Named:
    """Of a layer of Mamba-2."""
    spec, prefix, mamba = store.spec, f"layers.{index}.mamba", store.spec.layers[index].mixer
    names = in_layer(mamba.names, index)
    yield from _norm(store, f"{prefix}.norm", names.norm)
    convolved, gates = np.split(_matrix(store, f"{prefix}.in", mamba.width, spec.hidden), [mamba.channels])
    yield names.into, np.concatenate([gates, convolved, store.array(f"{prefix}.steps")])
    yield names.taps, store.array(f"{prefix}.taps").reshape(-1, 1, mamba.taps)
    if mamba.conv_bias:
        yield _bias(names.taps), store.array(f"{prefix}.taps_bias")
    for part in ("step_bias", "decay_rate", "skip", "group_norm"):
        yield getattr(names, part), store.array(f"{prefix}.{part}")
    yield names.out, _matrix(store, f"{prefix}.out", spec.hidden, mamba.inner)


def _block_selected(store: Store, index: int) -> Named:
    yield from _attention(store, index)
    indexer, prefix = store.spec.layers[index].mixer.indexer, f"layers.{index}.indexer"
    names, plus = in_layer(indexer.names, index), np.float32(store.spec.place(index, store.mix).norm_plus)
    yield names.q, _matrix(store, f"{prefix}.q", indexer.width, store.spec.hidden)
    yield names.k, _matrix(store, f"{prefix}.k", indexer.head_dim, store.spec.hidden)
    yield names.q_norm, store.array(f"{prefix}.q_norm") - plus
    yield names.k_norm, store.array(f"{prefix}.norm") - plus


_MIXERS = {
    BlockSelectedAttention: _block_selected,
    ShortConv: _conv,
    LatentAttention: _latent,
    IndexedAttention: _indexed,
    GatedDeltaNet: delta_tensors,
    Mamba2: mamba_tensors,
    GatedLatentAttention: _gated_latent,
    KimiDeltaAttention: kimi_tensors,
    NoMixer: lambda store, index: iter(()),
}


def _feed_forward(store: Store, index: int) -> Named:
    layer = store.spec.layers[index]
    if isinstance(layer.feed_forward, NoFeedForward):
        return
    names = in_layer(layer.feed_forward.names, index)
    yield from _norm(store, f"layers.{index}.ffn.norm", names.norm)
    if names.post_norm:
        yield from _norm(store, f"layers.{index}.ffn.post_norm", names.post_norm)
    if not layer.feed_forward.is_moe:
        gate, up, down = _expert(store, index, layer, 0)
        if names.dense.up:
            yield from _named(names.dense.of_expert(0), (gate, up, down))
        else:
            yield names.dense.fused_gate_up, np.concatenate([gate, up])
            yield names.dense.fused_down, down
        return
    router, ffn = names.router, layer.feed_forward
    scores = store.array(f"layers.{index}.ffn.router")
    yield router, scores[: ffn.experts]
    if ffn.shared_gate:
        yield names.shared_gate, scores[ffn.experts :]
    if ffn.shared_intermediate:
        gate, up, down = _gated(store, f"layers.{index}.ffn.shared", ffn.shared_intermediate)
        if names.shared.up:
            yield from _named(names.shared.of_expert(0), (gate, up, down))
        else:
            yield names.shared.fused_gate_up, np.concatenate([gate, up])
            yield names.shared.fused_down, down
    if ffn.router and ffn.router.bias:
        yield _bias(router), store.array(f"layers.{index}.ffn.router_bias")
    if ffn.router and ffn.router.correction:
        correction = store.array(f"layers.{index}.ffn.router_correction")
        yield names.correction, correction[None] if names.correction_row else correction
    if store.spec.model_type in STACKED:
        yield from _stacked(store, index, layer)
        return
    for expert in range(ffn.experts):
        yield from _named(names.experts.of_expert(expert), _expert(store, index, layer, expert))


def _named(names: tuple[str, ...], matrices: tuple[np.ndarray, ...]) -> Named:
    """Those that the family has."""
    return ((name, matrix) for name, matrix in zip(names, matrices, strict=True) if name)


def _stacked(store: Store, index: int, layer: LayerSpec) -> Named:
    """Experts in one tensor, with their biases, as transformers holds them."""
    ffn, prefix = layer.feed_forward, f"layers.{index}.ffn"
    names = in_layer(ffn.names.experts, index)
    gate, up, down = map(np.stack, zip(*(_expert(store, index, layer, e) for e in range(ffn.experts)), strict=True))
    if not names.fused_alternate:
        yield names.fused_gate_up, np.concatenate([gate, up], axis=1)
        yield names.fused_down, down
        return
    both = np.stack([gate, up], axis=2).reshape(ffn.experts, -1, store.spec.hidden)
    blocks = store.array(f"{prefix}.gate_up_bias").transpose(0, 1, 3, 2).reshape(ffn.experts, -1)
    biases = blocks[:, : both.shape[1]], store.array(f"{prefix}.down_bias")[:, : store.spec.hidden]
    for name, weight, bias in zip((names.fused_gate_up, names.fused_down), (both, down), biases, strict=True):
        yield name, weight.transpose(0, 2, 1)
        yield f"{name}_bias", bias


def _expert(store: Store, index: int, layer: LayerSpec, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gate, up and down of one expert; its blocks of gate and up alternate. Without a gate up is there twice."""
    return _gated(store, f"layers.{index}.ffn.experts", layer.feed_forward.intermediate, expert)


def _gated(store: Store, name: str, n: int, *expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blob, format = store.array(name)[expert], store.tensors[name].format
    assert format is not None
    tensor = store.tensors[name]
    assert isinstance(tensor.origin, Gated)
    k, count = tensor.origin.hidden, tensor.origin.wide
    start, (wide, narrow) = down_offset(format, k, n, count), (FORMATS[one] for one in matrix_formats(format))
    blocks = blob[:start].reshape(-1, count, wide.block_bytes(tensor.runs[0].inputs))
    gate, up = (wide.unpack(blocks[:, i], n, k) for i in (0, count - 1))
    return gate, up, narrow.unpack(blob[start:], k, n)


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
