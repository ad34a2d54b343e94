"""DeepSeek-V4: attention to the last tokens and to compressed ones, and a residual stream of several streams.

Layers see the window alone, or besides it entries of 4 tokens that an indexer selects, or all entries of 128. The first
layers choose experts by the token itself. Layers that predict further tokens (`mtp.`) are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.formats.block import BLOCK, K_ALIGN
from hybrid.models.decoder import Defaults, read_experts, read_layer_count, read_max_position, read_model
from hybrid.models.layers.compressed import MAX_WINDOW, CompressedAttention
from hybrid.models.layers.compressed_names import CompressedNames
from hybrid.models.layers.compressor import Compressor, CompressorNames
from hybrid.models.layers.entry_indexer import EntryIndexer, EntryIndexerNames
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.reading import Fields
from hybrid.models.rope import RopeSpec, read_rope
from hybrid.models.spec import LayerSpec, ModelSpec, OuterNames
from hybrid.models.streams import read_streams, stream_names
from hybrid.models.tensors import GatedNames

DEFAULTS = Defaults(max_position=1_048_576)
WINDOW, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = {0: WINDOW, 4: SPARSE, 128: HEAVY}  # words of `layer_types` by the numbers of `compress_ratios`
RATES = {SPARSE: 4, HEAVY: 128}
HASHED, ROUTED = "hash_moe", "moe"  # words of `mlp_layer_types`
LIMIT = 10.0  # of what experts multiply, as the kernels have it
MAX_DIM, MAX_HEADS = 1024, 256  # of what the kernels hold

_LAYER = "model.layers.{layer}"
_ATTENTION, _FFN = f"{_LAYER}.attn", f"{_LAYER}.ffn"
NAMES = CompressedNames(
    norm=f"{_LAYER}.attn_norm.weight",
    q_down=f"{_ATTENTION}.wq_a.weight",
    q_norm=f"{_ATTENTION}.q_norm.weight",
    q_up=f"{_ATTENTION}.wq_b.weight",
    kv=f"{_ATTENTION}.wkv.weight",
    kv_norm=f"{_ATTENTION}.norm.weight",
    sinks=f"{_ATTENTION}.attn_sink",
    out_down=f"{_ATTENTION}.wo_a.weight",
    out_up=f"{_ATTENTION}.wo_b.weight",
)


def _gated(module: str) -> GatedNames:
    return GatedNames(f"{module}.w1.weight", f"{module}.w3.weight", f"{module}.w2.weight")


FEED_FORWARD = FeedForwardNames(
    norm=f"{_LAYER}.ffn_norm.weight",
    router=f"{_FFN}.gate.weight",
    correction=f"{_FFN}.gate.bias",
    by_token=f"{_FFN}.gate.tid2eid",
    experts=_gated(f"{_FFN}.experts.{{expert}}"),
    shared=_gated(f"{_FFN}.shared_experts"),
)
OUTER = OuterNames(head="head.weight")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config)
    ropes = _read_ropes(config, fields)
    kinds, experts = _read_kinds(fields), _read_experts(fields)
    mixers = {kind: _read_attention(fields, kind, ropes[kind != WINDOW]) for kind in dict.fromkeys(kinds)}
    layers = [LayerSpec(mixers[kind], half) for kind, half in zip(kinds, experts, strict=True)]
    model = read_model(fields, "deepseek_v4", layers, DEFAULTS, names=OUTER)
    return replace(model, streams=replace(read_streams(fields), head=stream_names("model.hc_head.hc")))


def _read_kinds(fields: Fields) -> list[str]:
    """Of every layer, from words or numbers, of which there may be more: those of layers that are not read."""
    count = read_layer_count(fields)
    ratios = fields.integers("compress_ratios")[:count]
    default = [HEAVY if layer < 2 or layer % 2 == 0 else SPARSE for layer in range(count)]
    if ratios:
        default = [KINDS.get(ratio, "") for ratio in ratios]
        if "" in default or len(default) < count:
            raise ConfigError(
                f"config.json: compress_ratios is {ratios}; it must have one of {', '.join(map(str, KINDS))} for each "
                f"of the {count} layers: correct it"
            )
    return fields.spelled_out("layer_types", {}, count).choices(
        "layer_types", default=default, allowed=[*KINDS.values()]
    )


def _read_experts(fields: Fields) -> list[FeedForward]:
    """Of every layer: the first ones choose by token."""
    fields.choice("scoring_func", default="sqrtsoftplus", allowed=("sqrtsoftplus",))
    fields.choice("topk_method", default="noaux_tc", allowed=("noaux_tc",))
    fields.refuse("swiglu_limit", neutral=LIMIT)
    fields.refuse("n_group", "topk_group", neutral=1)
    fields.refuse("norm_topk_prob", neutral=True)
    fields.refuse("n_shared_experts", neutral=1)
    intermediate, count = fields.size("moe_intermediate_size"), read_layer_count(fields)
    plain = read_experts(fields, intermediate, renormalise=True, names=FEED_FORWARD)
    assert plain.router
    scale = fields.number("routed_scaling_factor", default=1.5)
    router = replace(plain.router, kind="root_softplus", scale=scale)
    half = replace(plain, activation="silu_clamped", shared_intermediate=intermediate)
    hashed = min(count, fields.size("num_hash_layers", default=3, minimum=0))
    default = [HASHED] * hashed + [ROUTED] * (count - hashed)
    kinds = fields.spelled_out("mlp_layer_types", {}, count)
    routers = {
        HASHED: replace(router, by_token=fields.size("vocab_size", maximum=10**8)),
        ROUTED: replace(router, correction=True),
    }
    return [
        replace(half, router=routers[kind])
        for kind in kinds.choices("mlp_layer_types", default=default, allowed=(HASHED, ROUTED))
    ]


def _read_ropes(config: Mapping[str, Any], fields: Fields) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see their window alone, and of the others: two sets of frequencies for the same dimensions."""
    head, max_position = _head_dim(fields), read_max_position(fields, DEFAULTS)
    turned = fields.size("qk_rope_head_dim", default=head // 8, maximum=head)
    if fields.has("partial_rotary_factor"):
        turned = int(head * fields.number("partial_rotary_factor"))
    if turned % 2 or not 2 <= turned <= head:
        raise ConfigError(
            f"config.json: {turned} of the {head} dimensions of a head turn; it must be an even number of them, from 2 "
            "on: correct qk_rope_head_dim, or partial_rotary_factor"
        )
    both = config.get("rope_parameters") or config.get("rope_scaling") or {}
    both = both if isinstance(both, Mapping) else {}
    main = {"rope_type": "default", "rope_theta": fields.number("rope_theta", default=10_000.0, above=1)}
    theta = fields.number("compress_rope_theta", default=160_000.0, above=1)
    stretched = {**both, "rope_theta": theta}
    if isinstance(both.get("main"), Mapping) and isinstance(both.get("compress"), Mapping):
        main, stretched = {**both["main"]}, {**both["compress"]}
    if "yarn" in (stretched.get("rope_type"), stretched.get("type")):
        stretched.setdefault("attention_factor", 1.0)  # angles are not made larger, whatever YaRN would have
    ropes = []
    for own in (main, stretched):
        own.pop("partial_rotary_factor", None)
        words = Fields({"rope_parameters": own})
        ropes.append(read_rope(words, turned, theta=theta, max_position=max_position, interleaved=True))
    return ropes[0], ropes[1]


def _head_dim(fields: Fields) -> int:
    dim = fields.size("head_dim", default=512, minimum=2, maximum=MAX_DIM)
    if dim % 2:
        raise ConfigError(f"config.json: head_dim is {dim}; it must be even: correct it")
    return dim


def _read_attention(fields: Fields, kind: str, rope: RopeSpec) -> CompressedAttention:
    fields.refuse("num_key_value_heads", neutral=1)
    fields.refuse("attention_bias", "mlp_bias", neutral=False)
    heads, dim, groups = fields.size("num_attention_heads"), _head_dim(fields), fields.size("o_groups", default=8)
    rank = fields.size("o_lora_rank", default=1024)
    if heads % groups or heads // groups * dim % K_ALIGN or rank % BLOCK:
        raise ConfigError(
            f"config.json: o_groups {groups} of {heads} heads of {dim} dimensions, o_lora_rank {rank}; groups must be "
            f"equal, of a multiple of {K_ALIGN} dimensions, and o_lora_rank a multiple of {BLOCK}: correct them"
        )
    window = fields.size("sliding_window", default=128, maximum=MAX_WINDOW, maximum_of="what attention holds")
    q_rank = fields.size("q_lora_rank", default=1024)
    attention = CompressedAttention(heads, dim, q_rank, rope, window, groups, rank, NAMES)
    if kind == WINDOW:
        return attention
    compressor = Compressor(
        _read_rate(fields, kind), dim, kind == SPARSE, _compressor_names(f"{_ATTENTION}.compressor")
    )
    indexer = _read_indexer(fields, compressor, q_rank, rope) if kind == SPARSE else None
    return replace(attention, compressor=compressor, indexer=indexer)


def _read_rate(fields: Fields, kind: str) -> int:
    """Tokens of an entry: a power of two, so that entries end where pieces of sequences do that are kept."""
    rates = fields.group("compress_rates")
    old = {SPARSE: "compress_rate_csa", HEAVY: "compress_rate_hca"}[kind]
    rate = fields.size(
        old, default=rates.size(kind, default=RATES[kind], minimum=2, maximum=128), minimum=2, maximum=128
    )
    if rate & (rate - 1):
        raise ConfigError(f"config.json: {rate} tokens make an entry in {kind}; it must be a power of 2: correct it")
    return rate


def _read_indexer(fields: Fields, of: Compressor, q_rank: int, rope: RopeSpec) -> EntryIndexer:
    heads = fields.size("index_n_heads", default=64, maximum=MAX_HEADS)
    dim = fields.size("index_head_dim", default=128, minimum=rope.dim, maximum=MAX_DIM)
    if dim % 2:
        raise ConfigError(f"config.json: index_head_dim is {dim}; it must be even: correct it")
    names = EntryIndexerNames(f"{_ATTENTION}.indexer.wq_b.weight", f"{_ATTENTION}.indexer.weights_proj.weight")
    own = replace(of, dim=dim, names=_compressor_names(f"{_ATTENTION}.indexer.compressor"), stored="index_compressor")
    return EntryIndexer(heads, q_rank, fields.size("index_topk", default=512, maximum=10**6), own, names)


def _compressor_names(module: str) -> CompressorNames:
    return CompressorNames(f"{module}.wkv.weight", f"{module}.wgate.weight", f"{module}.ape", f"{module}.norm.weight")
