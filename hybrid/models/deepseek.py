"""What DeepSeek's models and those after them share, read from config.json: latent attention, indexers, sigmoids."""

from __future__ import annotations

import math
from dataclasses import replace

from hybrid.errors import ConfigError
from hybrid.formats.block import round_up
from hybrid.models.decoder import (
    SHARED_EXPERTS,
    Defaults,
    read_experts,
    read_first_dense,
    read_grouped_sigmoid,
    read_max_position,
    read_model,
)
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query_shape import KEY_ALIGN
from hybrid.models.layers.indexed import IndexedAttention
from hybrid.models.layers.indexer import Indexer
from hybrid.models.layers.latent import MAX_KEY_DIM, LatentAttention
from hybrid.models.reading import Fields
from hybrid.models.rope import RopeSpec, read_rope
from hybrid.models.spec import LayerSpec, ModelSpec

V3 = Defaults(max_position=4096)
DENSE, SPARSE = "dense", "sparse"  # words of `mlp_layer_types`
FULL, SHARED = "full", "shared"  # words of `indexer_types`
MAX_INDEX_HEADS = 256  # of what the kernels hold


def read_latent_attention(
    fields: Fields,
    defaults: Defaults,
    *,
    q_rank: int | None,
    nope_dim: int,
    value_dim: int,
    rank: int = 512,
    shared: int = 64,
    turns: bool = True,
) -> LatentAttention:
    """Latent attention; q_rank, nope_dim, value_dim, rank and shared are defaults, the last of the dimensions of keys
    that all heads share. turns: whether these have rope; there may be none if not.
    """
    heads, max_position = fields.size("num_attention_heads"), read_max_position(fields, defaults)
    fields.refuse("num_key_value_heads", neutral=heads)  # latents are shared by all heads
    rank = fields.size("kv_lora_rank", default=rank)
    turned = fields.size("qk_rope_head_dim", default=shared, minimum=1 if turns else 0)
    if turned % 2 or round_up(rank + (turned or 2), KEY_ALIGN) > MAX_KEY_DIM:
        raise ConfigError(
            f"config.json: kv_lora_rank {rank} and qk_rope_head_dim {turned} must be at most {MAX_KEY_DIM} together, "
            "and the latter even: correct them"
        )
    nope = fields.size("qk_nope_head_dim", default=nope_dim)
    rope = _read_rope(fields, defaults, turned, max_position) if turns else None
    low = fields.optional_size("q_lora_rank", default=q_rank)
    if not low:
        fields.refuse("attention_bias", neutral=False)  # which q_proj would lack
    return LatentAttention(
        heads,
        rank,
        low or 0,
        nope,
        fields.size("v_head_dim", default=value_dim),
        rope,
        (nope + turned) ** -0.5 * (_magnitude(rope) ** 2 if rope else 1.0),
        bias=fields.flag("attention_bias"),
        unturned=0 if turns else turned,
    )


def _read_rope(fields: Fields, defaults: Defaults, dim: int, max_position: int) -> RopeSpec:
    interleaved, grows = fields.flag("rope_interleave", default=True), defaults.rope_grows
    return read_rope(fields, dim, theta=defaults.theta, max_position=max_position, interleaved=interleaved, grows=grows)


def _magnitude(rope: RopeSpec) -> float:
    """By how much YaRN makes queries and keys larger that do not turn, as it does those that turn."""
    parameters = dict(rope.parameters)
    factor, scale = float(parameters.get("factor", 1.0)), float(parameters.get("mscale_all_dim", 0.0))  # type: ignore[arg-type]
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_deepseek_v3(fields: Fields, model_type: str) -> ModelSpec:
    """A model that is DeepSeek-V3, perhaps with other numbers."""
    attention = read_latent_attention(fields, V3, q_rank=1536, nope_dim=128, value_dim=128)
    experts = read_sigmoid_experts(fields, scale=2.5, groups=(8, 4))
    halves = read_first_dense(fields, experts, default=3)
    return read_model(fields, model_type, [LayerSpec(attention, half) for half in halves], V3)


def read_indexed(
    fields: Fields,
    model_type: str,
    defaults: Defaults,
    *,
    q_rank: int,
    nope_dim: int,
    value_dim: int,
    groups: tuple[int, int],
    index_heads: int,
    interleaved: bool,
    shares: bool = False,
) -> ModelSpec:
    """A model whose layers, in sequences of more than `index_topk` tokens, attend to those that an indexer selects.

    groups: see `read_grouped_sigmoid`. index_heads, interleaved: defaults of the indexer. shares: whether layers may
    select what one before them did.
    """
    fields.refuse("rope_interleave", neutral=True)
    require_query_latents(fields, q_rank)
    attention = read_latent_attention(fields, defaults, q_rank=q_rank, nope_dim=nope_dim, value_dim=value_dim)
    halves = read_named_layers(fields, read_sigmoid_experts(fields, scale=2.5, groups=groups), dense=3)
    indexer, selects = read_indexer(fields, attention, index_heads, interleaved)
    own = read_own_indexers(fields, len(halves)) if shares else [True] * len(halves)
    mixers = [IndexedAttention.of(attention, selects, indexer if has_own else None) for has_own in own]
    layers = [LayerSpec(mixer, half) for mixer, half in zip(mixers, halves, strict=True)]
    spec = read_model(fields, model_type, layers, defaults)
    return spec.within(spec.max_position)


def require_query_latents(fields: Fields, q_rank: int) -> None:
    """q_rank: of them, a default."""
    if fields.optional_size("q_lora_rank", default=q_rank) is None:
        raise ConfigError(
            "config.json: q_lora_rank is null; it must be a number, the size of the latents from which an indexer "
            "makes its queries: correct it"
        )


def read_indexer(fields: Fields, attention: LatentAttention, heads: int, interleaved: bool) -> tuple[Indexer, int]:
    """An indexer, and how many tokens it selects. heads, interleaved: defaults."""
    turned, selects = attention.shared_dim, fields.size("index_topk", default=2048, maximum=10**9)
    heads = fields.size("index_n_heads", default=heads, maximum=MAX_INDEX_HEADS)
    dim = fields.size("index_head_dim", default=128, minimum=turned, maximum=MAX_KEY_DIM)
    if dim % 2:
        raise ConfigError(f"config.json: index_head_dim is {dim}; it must be even: correct it")
    interleaved = fields.flag("indexer_rope_interleave", default=interleaved)
    return Indexer(heads, dim, attention.q_rank, interleaved), selects


def read_own_indexers(fields: Fields, layers: int) -> list[bool]:
    """Of every layer, whether it has an indexer. The first must have one."""
    name, kinds = read_indexer_kinds(fields, layers)
    if kinds[0] != FULL:
        raise ConfigError(
            f"config.json: {name} says {SHARED} of the first layer, before which none selects; it must be {FULL}: "
            "correct it"
        )
    return [kind == FULL for kind in kinds]


def read_indexer_kinds(fields: Fields, layers: int) -> tuple[str, list[str]]:
    """Of every layer, whether it has an indexer: by name, by a pattern of names or their first letters, or in turn; and
    the field that says so.
    """
    names = "indexer_types", "index_topk_pattern"
    name = next((name for name in names if fields.has(name)), names[0])
    every = fields.size("index_topk_freq", default=1, minimum=0) or 1
    first = fields.size("index_skip_topk_offset", default=2, minimum=0)
    in_turn = [FULL if max(layer - first + 1, 0) % every == 0 else SHARED for layer in range(layers)]
    spelled = fields.spelled_out(name, {"F": FULL, "S": SHARED}, layers)
    return name, spelled.choices(name, default=in_turn, allowed=(FULL, SHARED))


def read_named_layers(fields: Fields, experts: FeedForward, *, dense: int = 1) -> list[FeedForward]:
    """Of every layer: by name, or the first few are dense. dense: how many, a default."""
    plain = FeedForward(fields.size("intermediate_size"))
    default = [SPARSE if half.is_moe else DENSE for half in read_first_dense(fields, experts, default=dense)]
    kinds = fields.choices("mlp_layer_types", default=default, allowed=(DENSE, SPARSE))
    return [experts if kind == SPARSE else plain for kind in kinds]


def read_sigmoid_experts(fields: Fields, *, scale: float, groups: tuple[int, int] = (1, 1)) -> FeedForward:
    """Experts chosen by sigmoids within groups, and the shared one. scale, groups: see `read_grouped_sigmoid`."""
    fields.choice("scoring_func", default="sigmoid", allowed=("sigmoid",))
    fields.choice("topk_method", default="noaux_tc", allowed=("noaux_tc",))
    experts = read_shared(fields, renormalise=fields.flag("norm_topk_prob", default=True))
    return read_grouped_sigmoid(fields, experts, scale=scale, groups=groups)


def read_shared(fields: Fields, *, renormalise: bool, shared: int = 1) -> FeedForward:
    """Routed experts, and shared ones that are one as wide as all of them. shared: how many there are, a default."""
    fields.refuse("moe_layer_freq", neutral=1)
    intermediate = fields.size("moe_intermediate_size")
    experts = read_experts(fields, intermediate, renormalise=renormalise, names=SHARED_EXPERTS)
    count = fields.size("n_shared_experts", default=shared, minimum=0)
    return replace(experts, shared_intermediate=intermediate * count)
