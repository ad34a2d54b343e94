"""What the decoder families share, read from config.json: attention, experts, the frame around the layers."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid.errors import ConfigError
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.grouped_query_shape import QkNorm
from hybrid.models.layers.router import FeedForwardNames, Router
from hybrid.models.reading import Fields
from hybrid.models.rope import read_rope
from hybrid.models.spec import (
    LayerSpec,
    ModelSpec,
    OuterNames,
)
from hybrid.models.tensors import gated_names

# The expert that all rows share, as DeepSeek and those after it name it.
SHARED_EXPERTS = FeedForwardNames(shared=gated_names("model.layers.{layer}.mlp.shared_experts"))
_MIXTRAL = "model.layers.{layer}.block_sparse_moe"
MIXTRAL_NAMES = FeedForwardNames(
    router=f"{_MIXTRAL}.gate.weight",
    experts=replace(
        FeedForwardNames().experts,
        gate=f"{_MIXTRAL}.experts.{{expert}}.w1.weight",
        up=f"{_MIXTRAL}.experts.{{expert}}.w3.weight",
        down=f"{_MIXTRAL}.experts.{{expert}}.w2.weight",
    ),
)
MAX_LAYERS = 1024  # published models have up to 126; a plan takes a millisecond for each
FULL, SLIDING = "full_attention", "sliding_attention"  # words of `layer_types`


@dataclass(frozen=True)
class Defaults:
    """What a family takes for fields that its config.json leaves out, as `transformers` does.

    kv_heads None: as many as query heads. head_dim None: hidden size / heads. Null in config.json means these, too.
    """

    max_position: int
    eps: float = 1e-6
    theta: float = 10_000.0
    kv_heads: int | None = None
    head_dim: int | None = None
    tied: bool = False
    rope_part: float | None = None  # of the dimensions of a head; None: all, and config.json may not say otherwise
    rope_interleaved: bool = False
    rope_grows: bool = False  # whether config.json may make late queries larger


def read_attention(
    fields: Fields,
    defaults: Defaults,
    *,
    qk_norm: QkNorm = "none",
    bias: bool = False,
    window: int | None = None,
) -> GroupedQueryAttention:
    """Grouped-query attention; `bias` is that of all four projections."""
    heads = fields.size("num_attention_heads")
    own = None if fields.is_null("num_key_value_heads") else defaults.kv_heads
    kv_heads = fields.size("num_key_value_heads", default=own or heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: "
            "correct one of them so that every key head serves the same number of query heads"
        )
    dim = read_head_dim(fields, defaults)
    rope = read_rope(
        fields,
        dim,
        theta=defaults.theta,
        max_position=read_max_position(fields, defaults),
        part=defaults.rope_part,
        interleaved=defaults.rope_interleaved,
        by_length=True,
        grows=defaults.rope_grows,
    )
    return GroupedQueryAttention(
        heads, kv_heads, dim, rope, qk_norm=qk_norm, qkv_bias=bias, out_bias=bias, window=window
    )


def read_windows(fields: Fields, window: int | None, *, default: Sequence[str]) -> list[int | None]:
    """Each layer's window: `window` where `layer_types`, or else `default`, says that it slides."""
    allowed = (FULL, SLIDING) if window else (FULL,)
    kinds = fields.choices("layer_types", default=default, allowed=allowed)
    return [window if kind == SLIDING else None for kind in kinds]


def read_late_windows(fields: Fields) -> list[int | None]:
    """Each layer's window in Qwen2 and Qwen3: named by `layer_types`, or those from `max_window_layers` on slide."""
    window = fields.optional_size("sliding_window", default=4096) if fields.flag("use_sliding_window") else None
    first = fields.size("max_window_layers", default=28, minimum=0) if window else read_layer_count(fields)
    default = [SLIDING if layer >= first else FULL for layer in range(read_layer_count(fields))]
    return read_windows(fields, window, default=default)


def read_experts(
    fields: Fields, intermediate: int, *, renormalise: bool, names: FeedForwardNames | None = None
) -> FeedForward:
    """Routed experts, chosen by a softmax over all; versions of transformers and families name their number
    differently.
    """
    experts = fields.size("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", maximum=10**5)
    top_k = fields.size("num_experts_per_tok", "moe_k", "moe_topk", maximum=experts, maximum_of="the number of experts")
    router = Router(top_k, "softmax", renormalise=renormalise)
    return FeedForward(intermediate, experts, router, names=names or FeedForwardNames())


def read_grouped_sigmoid(
    fields: Fields, experts: FeedForward, *, scale: float, groups: tuple[int, int] = (1, 1)
) -> FeedForward:
    """The same experts, chosen by sigmoids and corrections within groups, as DeepSeek-V3 does.

    scale, groups: defaults; of the latter how many there are, and how many are chosen among.
    """
    grouped = read_groups(fields, experts, default=groups)
    assert grouped.router is not None
    factor = fields.number("routed_scaling_factor", default=scale)
    return replace(grouped, router=replace(grouped.router, kind="sigmoid", correction=True, scale=factor))


def read_groups(fields: Fields, experts: FeedForward, *, default: tuple[int, int] = (1, 1)) -> FeedForward:
    """The same experts, chosen within the best groups."""
    assert experts.router is not None
    groups = fields.size("n_group", default=default[0], maximum=64)
    top_groups = fields.size("topk_group", default=min(groups, default[1]), maximum=groups, maximum_of="n_group")
    size, rest = divmod(experts.experts, groups)
    if rest or (groups > 1 and size < 2) or top_groups * size < experts.router.top_k:
        raise ConfigError(
            f"config.json: {experts.experts} experts in n_group {groups} groups, of which topk_group {top_groups} are "
            f"chosen among, cannot give each token {experts.router.top_k}: correct one of them"
        )
    return replace(experts, router=replace(experts.router, groups=groups, top_groups=top_groups))


def read_sparse_layers(fields: Fields, experts: FeedForward) -> list[FeedForward]:
    """Every `decoder_sparse_step`-th layer has these experts, except those in `mlp_only_layers`."""
    layers = range(read_layer_count(fields))
    step, dense = fields.size("decoder_sparse_step", default=1), set(fields.integers("mlp_only_layers"))
    routed = [layer not in dense and (layer + 1) % step == 0 for layer in layers]
    if all(routed):
        return [experts for _ in layers]
    plain = FeedForward(fields.size("intermediate_size"))
    return [experts if is_routed else plain for is_routed in routed]


def read_first_dense(
    fields: Fields,
    experts: FeedForward,
    *,
    default: int = 1,
    name: str = "first_k_dense_replace",
) -> list[FeedForward]:
    """The first layers are dense, the others have these experts. default, name: of the field that says how many."""
    count = read_layer_count(fields)
    dense = fields.size(name, default=default, minimum=0)
    plain = FeedForward(fields.size("intermediate_size"), names=experts.names)
    return [plain if layer < dense else experts for layer in range(count)]


def read_model(
    fields: Fields,
    model_type: str,
    layers: Sequence[LayerSpec],
    defaults: Defaults,
    names: OuterNames | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> ModelSpec:
    """The whole decoder around its layers: RMSNorm everywhere, no bias on the head. activation: the only one there is,
    behind the name of its field.

    How its weights are quantised is no part of it: `hybrid.weights.checkpoints.published` reads or refuses that.
    """
    fields.choice(activation[0], default=activation[1], allowed=activation[1:])
    return ModelSpec(
        model_type=model_type,
        vocab=fields.size("vocab_size", maximum=10**8),
        hidden=fields.size("hidden_size"),
        layers=tuple(layers),
        eps=fields.number("rms_norm_eps", "norm_eps", default=defaults.eps),
        max_position=read_max_position(fields, defaults),
        tied=fields.flag("tie_word_embeddings", "tie_embedding", default=defaults.tied),
        names=names or OuterNames(),
    )


def of_rope(config: Mapping[str, Any], kind: str, default: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the rope of one kind of layer alone, or a default."""
    rest = {name: value for name, value in config.items() if not name.startswith("rope_")}
    both = config.get("rope_parameters") or {}
    if not isinstance(both, Mapping) or (both and not any(isinstance(rope, Mapping) for rope in both.values())):
        raise ConfigError(
            f"config.json: rope_parameters is {reprlib.repr(both)}; it must be an object with one for each kind of "
            f"layer, as {kind}: correct it"
        )
    own = both.get(kind)
    return {**rest, "rope_parameters": default if own is None else own}


def with_rope(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a rope, where it says nothing of one."""
    said = any(config.get(name) is not None for name in ("rope_parameters", "rope_scaling"))
    return {**config} if said else {**config, "rope_parameters": {**default}}


def read_layer_count(fields: Fields) -> int:
    return fields.size("num_hidden_layers", maximum=MAX_LAYERS)


def read_max_position(fields: Fields, defaults: Defaults) -> int:
    return fields.size("max_position_embeddings", default=defaults.max_position, maximum=10**9)


def read_head_dim(fields: Fields, defaults: Defaults) -> int:
    """Dimensions of a head: of queries, keys and values."""
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    own = None if fields.is_null("head_dim") else defaults.head_dim
    if not fields.has("head_dim") and own is None and hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads} and "
            "head_dim is missing: correct one of them or add head_dim"
        )
    dim = fields.size("head_dim", default=own or hidden // heads)
    if dim % 2:
        raise ConfigError(
            f"config.json: the head dimension {dim} is odd, and rotary embedding turns pairs: "
            "correct head_dim, or hidden_size and num_attention_heads"
        )
    return dim
