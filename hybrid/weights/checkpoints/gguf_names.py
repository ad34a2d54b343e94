"""What the tensors of a model are called in GGUF files: the same spec, with other names.

GGUF files hold all experts of a layer in one tensor (in old files, one each). Here each has tensors of its own, which
are named as in old files: `blk.3.ffn_gate.17.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from hybrid.errors import WeightsError
from hybrid.formats.block import Array
from hybrid.models.layers.absent import NoFeedForward, NoMixer
from hybrid.models.layers.base import Mixer
from hybrid.models.layers.beside_attention import BesideAttention
from hybrid.models.layers.block_indexer import BlockIndexer, BlockIndexerNames
from hybrid.models.layers.block_selected import BlockSelectedAttention
from hybrid.models.layers.compressed import CompressedAttention
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.gated_delta import GatedDeltaNames, GatedDeltaNet
from hybrid.models.layers.gated_latent import GatedLatentAttention
from hybrid.models.layers.grouped_query import GroupedQueryAttention, GroupedQueryNames
from hybrid.models.layers.indexed import IndexedAttention
from hybrid.models.layers.indexer import Indexer, IndexerNames
from hybrid.models.layers.kimi_delta import KimiDeltaAttention, KimiDeltaNames
from hybrid.models.layers.latent import LatentAttention
from hybrid.models.layers.latent_names import LatentNames
from hybrid.models.layers.mamba2 import Mamba2, Mamba2Names
from hybrid.models.layers.parallel_feed_forward import ParallelFeedForward
from hybrid.models.layers.pool_indexer import PoolIndexer
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.layers.short_conv import ShortConv, ShortConvNames
from hybrid.models.spec import LayerSpec, ModelSpec, OuterNames
from hybrid.models.tensors import GatedNames
from hybrid.weights.checkpoints.gguf_architectures import NEMOTRON
from hybrid.weights.checkpoints.gguf_compressed import with_compressed_names, with_pool_names, with_stream_names
from hybrid.weights.checkpoints.gguf_scales import ScaledTensor
from hybrid.weights.shard import Entry

# Rows of queries and keys lie as their rope turns them: pair by pair.
PERMUTED = ("llama", "granite", "granitemoe", "granitehybrid", *NEMOTRON, "smollm3", "mistral3")
DELTAS = ("qwen3next", "qwen35", "qwen35moe")
_NORM_BEHIND = (
    "gpt-oss",
    "glm4moe",
    "seed_oss",
    *DELTAS,
)  # the norm before the feed-forward is named after the attention
_LAYER = "blk.{layer}"
_STACKED = re.compile(r"(blk\.\d+)\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias)")
_CORRECTIONS = re.compile(r"blk\.\d+\.exp_probs_b")  # as files of hy_v3 call them
_UP = re.compile(r"(blk\.\d+)\.ffn_up\.weight")
_QKV = re.compile(r"(blk\.\d+)\.attn_qkv\.(weight|bias)")

OUTER = OuterNames("token_embd.weight", "output_norm.weight", "output.weight")
_OTHER_NAMES = {"token_embd_norm.weight": OUTER.final_norm}  # of what some files misname
GROUP_NORM = ".ssm_norm.weight"  # how the names of weights end that files have by groups
FINAL_NORMS = frozenset((OUTER.final_norm, *_OTHER_NAMES))
_POST_ATTENTION, _POST_FEED_FORWARD = f"{_LAYER}.post_attention_norm.weight", f"{_LAYER}.post_ffw_norm.weight"
_FACTOR = f"{_LAYER}.layer_output_scale.weight"
CONVOLUTION = ShortConvNames(
    norm=f"{_LAYER}.attn_norm.weight",
    into=f"{_LAYER}.shortconv.in_proj.weight",
    taps=f"{_LAYER}.shortconv.conv.weight",
    out=f"{_LAYER}.shortconv.out_proj.weight",
)
ATTENTION = GroupedQueryNames(
    norm=f"{_LAYER}.attn_norm.weight",
    q=f"{_LAYER}.attn_q.weight",
    k=f"{_LAYER}.attn_k.weight",
    v=f"{_LAYER}.attn_v.weight",
    out=f"{_LAYER}.attn_output.weight",
    q_norm=f"{_LAYER}.attn_q_norm.weight",
    k_norm=f"{_LAYER}.attn_k_norm.weight",
    sinks=f"{_LAYER}.attn_sinks.weight",
    gate=f"{_LAYER}.attn_gate.weight",
)
LATENT = LatentNames(
    norm=f"{_LAYER}.attn_norm.weight",
    q=f"{_LAYER}.attn_q.weight",
    q_down=f"{_LAYER}.attn_q_a.weight",
    q_norm=f"{_LAYER}.attn_q_a_norm.weight",
    q_up=f"{_LAYER}.attn_q_b.weight",
    kv_down=f"{_LAYER}.attn_kv_a_mqa.weight",
    kv_norm=f"{_LAYER}.attn_kv_a_norm.weight",
    kv_up=f"{_LAYER}.attn_kv_b.weight",
    keys=f"{_LAYER}.attn_k_b.weight",
    values=f"{_LAYER}.attn_v_b.weight",
    out=f"{_LAYER}.attn_output.weight",
)
INDEXER = IndexerNames(
    q=f"{_LAYER}.indexer.attn_q_b.weight",
    k=f"{_LAYER}.indexer.attn_k.weight",
    k_norm=f"{_LAYER}.indexer.k_norm.weight",
    weights=f"{_LAYER}.indexer.proj.weight",
)
BLOCK_INDEXER = BlockIndexerNames(
    q=f"{_LAYER}.indexer.q_proj.weight",
    k=f"{_LAYER}.indexer.k_proj.weight",
    q_norm=f"{_LAYER}.indexer.q_norm.weight",
    k_norm=f"{_LAYER}.indexer.k_norm.weight",
)
# The projections of decays and of gates are called after their latents where there are none.
KIMI_DELTA = KimiDeltaNames(
    norm=f"{_LAYER}.attn_norm.weight",
    q=f"{_LAYER}.attn_q.weight",
    k=f"{_LAYER}.attn_k.weight",
    v=f"{_LAYER}.attn_v.weight",
    q_taps=f"{_LAYER}.ssm_conv1d_q.weight",
    k_taps=f"{_LAYER}.ssm_conv1d_k.weight",
    v_taps=f"{_LAYER}.ssm_conv1d_v.weight",
    decays_down=f"{_LAYER}.ssm_f_a.weight",
    decays=f"{_LAYER}.ssm_f_b.weight",
    gates_down=f"{_LAYER}.ssm_g_a.weight",
    gates=f"{_LAYER}.ssm_g_b.weight",
    betas=f"{_LAYER}.ssm_beta.weight",
    decay_rate=f"{_LAYER}.ssm_a",
    decay_bias=f"{_LAYER}.ssm_dt.bias",
    head_norm=f"{_LAYER}.ssm_norm.weight",
    out=f"{_LAYER}.attn_output.weight",
)
_FULL_RANK = replace(KIMI_DELTA, decays=KIMI_DELTA.decays_down, gates=KIMI_DELTA.gates_down)
# Betas and decays are by key head in files of qwen3next alone.
DELTA = GatedDeltaNames(
    norm=f"{_LAYER}.attn_norm.weight",
    grouped="",
    grouped_decays="",
    qkv=f"{_LAYER}.attn_qkv.weight",
    gates=f"{_LAYER}.attn_gate.weight",
    betas=f"{_LAYER}.ssm_beta.weight",
    decays=f"{_LAYER}.ssm_alpha.weight",
    taps=f"{_LAYER}.ssm_conv1d.weight",
    decay_rate=f"{_LAYER}.ssm_a",
    decay_bias=f"{_LAYER}.ssm_dt.bias",
    head_norm=f"{_LAYER}.ssm_norm.weight",
    out=f"{_LAYER}.ssm_out.weight",
)
MAMBA = Mamba2Names(
    norm=f"{_LAYER}.attn_norm.weight",
    into=f"{_LAYER}.ssm_in.weight",
    taps=f"{_LAYER}.ssm_conv1d.weight",
    step_bias=f"{_LAYER}.ssm_dt.bias",
    decay_rate=f"{_LAYER}.ssm_a",
    skip=f"{_LAYER}.ssm_d",
    group_norm=f"{_LAYER}.ssm_norm.weight",
    out=f"{_LAYER}.ssm_out.weight",
)


def _gated(ending: str) -> GatedNames:
    gate, up, down = (f"{_LAYER}.ffn_{which}{ending}.weight" for which in ("gate", "up", "down"))
    return GatedNames(gate, up, down)


_ROUTER, _CORRECTION = f"{_LAYER}.ffn_gate_inp.weight", f"{_LAYER}.exp_probs_b.bias"
FEED_FORWARD = FeedForwardNames(
    norm=f"{_LAYER}.ffn_norm.weight",
    dense=_gated(""),
    router=_ROUTER,
    fused_router=_ROUTER,
    experts=_gated(".{expert}"),
    shared=_gated("_shexp"),
    shared_gate=f"{_LAYER}.ffn_gate_inp_shexp.weight",
    correction=_CORRECTION,
    fused_correction=_CORRECTION,
    by_token=f"{_LAYER}.ffn_gate_tid2eid.weight",
)
WITHOUT_GATES = replace(
    FEED_FORWARD,
    norm=f"{_LAYER}.attn_norm.weight",
    dense=replace(_gated(""), gate=""),
    experts=replace(_gated(".{expert}"), gate=""),
    shared=replace(_gated("_shexp"), gate=""),
    latent_down=f"{_LAYER}.ffn_latent_down.weight",
    latent_up=f"{_LAYER}.ffn_latent_up.weight",
)
BESIDE_DENSE = replace(
    FEED_FORWARD,
    norm=f"{_LAYER}.pre_ffw_norm_2.weight",
    post_norm=f"{_LAYER}.post_ffw_norm_2.weight",
    sum_norm=_POST_FEED_FORWARD,
    router_norm=f"{_LAYER}.ffn_gate_inp.scale",
    expert_scales=f"{_LAYER}.ffn_down_exps.scale",
    factor=_FACTOR,
)


def with_gguf_names(spec: ModelSpec, architecture: str) -> ModelSpec:
    """A copy of the spec of a model with the names of GGUF files of this architecture, whose norms are whole."""
    feed_forward = FEED_FORWARD
    if architecture in _NORM_BEHIND:
        feed_forward = replace(feed_forward, norm=_POST_ATTENTION)
    layers = tuple(
        LayerSpec(_mixer(layer.mixer, architecture), _named(layer.feed_forward, feed_forward)) for layer in spec.layers
    )
    norm = "rms" if spec.norm == "rms_less_one" else spec.norm
    streams = spec.streams and with_stream_names(spec.streams)
    return replace(spec, layers=layers, names=OUTER, norm=norm, streams=streams)


def _mixer(mixer: Mixer, architecture: str) -> Mixer:
    if isinstance(mixer, GatedDeltaNet):
        by_key_head = f"{_LAYER}.ssm_ba.weight" if architecture == "qwen3next" else ""
        return replace(mixer, names=replace(DELTA, grouped_decays=by_key_head))
    if isinstance(mixer, KimiDeltaAttention):
        return replace(mixer, names=KIMI_DELTA if mixer.rank else _FULL_RANK)
    if isinstance(mixer, GatedLatentAttention):
        mixer = replace(mixer, gates=f"{_LAYER}.attn_gate.weight")
    if isinstance(mixer, IndexedAttention) and isinstance(mixer.indexer, Indexer):
        mixer = replace(mixer, indexer=replace(mixer.indexer, names=INDEXER))
    if isinstance(mixer, IndexedAttention) and isinstance(mixer.indexer, PoolIndexer):
        mixer = replace(mixer, indexer=with_pool_names(mixer.indexer))
    if isinstance(mixer, LatentAttention):
        return replace(mixer, names=LATENT)
    if isinstance(mixer, NoMixer):
        return mixer
    if isinstance(mixer, CompressedAttention):
        return with_compressed_names(mixer)
    if isinstance(mixer, Mamba2):
        return replace(mixer, names=MAMBA)
    if isinstance(mixer, ShortConv):
        return replace(mixer, names=CONVOLUTION)
    if isinstance(mixer, BlockSelectedAttention) and isinstance(mixer.indexer, BlockIndexer):
        mixer = replace(mixer, indexer=replace(mixer.indexer, names=BLOCK_INDEXER))
    assert isinstance(mixer, GroupedQueryAttention), f"GGUF files have no {type(mixer).__name__}"
    own = mixer.names
    names = replace(ATTENTION, norm=own.norm and ATTENTION.norm, post_norm=own.post_norm and _POST_ATTENTION)
    return replace(mixer, names=names)


def _named(feed_forward: FeedForward, names: FeedForwardNames) -> FeedForward:
    if isinstance(feed_forward, ParallelFeedForward):
        dense = replace(feed_forward.dense, names=replace(names, post_norm=f"{_LAYER}.post_ffw_norm_1.weight"))
        return replace(feed_forward, names=BESIDE_DENSE, dense=dense)
    if isinstance(feed_forward, NoFeedForward):
        return feed_forward
    if feed_forward.wide == 1:
        return replace(feed_forward, names=WITHOUT_GATES)
    if isinstance(feed_forward, BesideAttention):
        names = replace(names, norm=ATTENTION.norm)
    own = feed_forward.names
    names = replace(names, norm=own.norm and names.norm, post_norm=own.post_norm and _POST_FEED_FORWARD)
    return replace(feed_forward, names=replace(names, factor=own.factor and _FACTOR))


def as_published(model_type: str, name: str, values: Array) -> Array:
    """A tensor of floats as its checkpoint had it: the logarithms of rates of decay."""
    if name.endswith(".ssm_a"):
        with np.errstate(divide="ignore", invalid="ignore"):  # what is not a rate is refused as not finite
            return np.log(values if model_type == "bailing_hybrid" else -values)
    return values


def permuted_heads(spec: ModelSpec, architecture: str) -> dict[str, int]:
    """Names of the weights whose rows are permuted, and their numbers of heads; biases beside them are, too."""
    if architecture not in PERMUTED:
        return {}
    found: dict[str, int] = {}
    for layer, place in enumerate(spec.layers):
        if isinstance(place.mixer, GroupedQueryAttention):
            for which, heads in (("q", place.mixer.heads), ("k", place.mixer.kv_heads)):
                found |= {f"blk.{layer}.attn_{which}.{kind}": heads for kind in ("weight", "bias")}
    return found


def apart(spec: ModelSpec, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of a file with each expert, and queries, keys and values, as tensors of their own.

    Raises WeightsError if two tensors of the file are the same one.
    """
    found: dict[str, Entry] = {}
    for name, entry in tensors.items():
        pieces = _pieces(spec, tensors, name, entry)
        if twice := pieces.keys() & found.keys():
            raise WeightsError(
                f"GGUF file: {name} is {min(twice)}, which is there under another name too; it must be there once"
            )
        found |= pieces
    return found


def _pieces(spec: ModelSpec, tensors: Mapping[str, Entry], name: str, entry: Entry) -> dict[str, Entry]:
    """What one of the tensors is, by the names that layers know."""
    if match := _STACKED.fullmatch(name):
        return dict(_experts(entry, *match.groups()))
    if match := _QKV.fullmatch(name):
        return dict(_queries_keys_values(spec, entry, *match.groups()))
    match = _UP.fullmatch(name)
    if match and _is_gated(spec, match[1]) and f"{match[1]}.ffn_gate.weight" not in tensors:
        return dict(_gate_and_up(entry, match[1]))
    if _CORRECTIONS.fullmatch(name):
        return {f"{name}.bias": entry}
    other = _OTHER_NAMES.get(name, name)
    return {name if other in tensors else other: entry}


def _is_gated(spec: ModelSpec, layer: str) -> bool:
    number = int(layer.removeprefix("blk."))
    return number >= len(spec.layers) or spec.layers[number].feed_forward.wide > 1


def kv_parts(name: str) -> tuple[str, str]:
    """Where newer files have that tensor of latent attention in two: keys [heads, rank, rows], turned, and values."""
    return name.replace("attn_kv_b", "attn_k_b"), name.replace("attn_kv_b", "attn_v_b")


def joined_kv(spec: ModelSpec, entries: dict[str, Entry]) -> dict[str, Entry]:
    """With an entry for what is in two tensors; it is not to be read itself."""
    for layer, place in enumerate(spec.layers):
        name = LATENT.kv_up.replace("{layer}", str(layer))
        keys, values = (entries.get(part) for part in kv_parts(name))
        if isinstance(place.mixer, LatentAttention) and name not in entries and keys and values:
            mixer = place.mixer
            shapes = (mixer.heads, mixer.rank, mixer.nope_dim), (mixer.heads, mixer.value_dim, mixer.rank)
            if (keys.shape, values.shape) == shapes:
                shape = (mixer.heads * (mixer.nope_dim + mixer.value_dim), mixer.rank)
                entries[name] = replace(keys, shape=shape, end=keys.start)
    return entries


def _experts(entry: Entry, layer: str, which: str, kind: str) -> Iterator[tuple[str, Entry]]:
    for expert, part in enumerate(_cut(entry, [1] * (entry.shape[0] if entry.shape else 0))):
        own = replace(part, shape=part.shape[1:])
        if isinstance(own, ScaledTensor):
            own = own.of_expert(expert)
        if which == "gate_up" and own.shape:
            half = own.shape[0] // 2
            for name, piece in zip(("gate", "up"), _cut(own, [half, own.shape[0] - half]), strict=True):
                yield f"{layer}.ffn_{name}.{expert}.{kind}", piece
        else:
            yield f"{layer}.ffn_{which}.{expert}.{kind}", own


def _gate_and_up(entry: Entry, layer: str) -> Iterator[tuple[str, Entry]]:
    """Of a dense feed-forward, whose only matrix beside down is called up."""
    half = entry.shape[0] // 2 if entry.shape else 0
    for name, piece in zip(("gate", "up"), _cut(entry, [half] * 2), strict=True):
        yield f"{layer}.ffn_{name}.weight", piece if entry.shape else entry


def _queries_keys_values(spec: ModelSpec, entry: Entry, layer: str, kind: str) -> Iterator[tuple[str, Entry]]:
    number = int(layer.removeprefix("blk."))
    mixer = spec.layers[number].mixer if number < len(spec.layers) else None
    if not isinstance(mixer, GroupedQueryAttention) or not entry.shape or entry.shape[0] != mixer.qkv_width:
        yield f"{layer}.attn_qkv.{kind}", entry
        return
    for which, part in zip("qkv", _cut(entry, [mixer.query_width, mixer.kv_width, mixer.values_width]), strict=True):
        yield f"{layer}.attn_{which}.{kind}", part


def _cut(entry: Entry, sizes: list[int]) -> Iterator[Entry]:
    """Parts of a tensor along its first dimension."""
    row, start = (entry.end - entry.start) // (entry.shape[0] if entry.shape else 1), entry.start
    for size in sizes:
        yield replace(entry, shape=(size, *entry.shape[1:]), start=start, end=start + size * row)
        start += size * row
