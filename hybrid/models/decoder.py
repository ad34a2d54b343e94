"""What the decoder families share, read from config.json: attention, experts, the frame around the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid.errors import ConfigError
from hybrid.models.layers.feed_forward import FeedForward, FeedForwardNames, Router
from hybrid.models.layers.grouped_query import GroupedQueryAttention, QkNorm
from hybrid.models.reading import Fields
from hybrid.models.rope import read_rope
from hybrid.models.spec import (
    LayerSpec,
    ModelSpec,
    OuterNames,
)

FULL, SLIDING = "full_attention", "sliding_attention"  # words of `layer_types`


@dataclass(frozen=True)
class Defaults:
    """What a family takes for fields that its config.json leaves out, as `transformers` does.

    kv_heads None: as many as query heads. head_dim None: hidden size / heads.
    """

    max_position: int
    eps: float = 1e-6
    theta: float = 10_000.0
    kv_heads: int | None = None
    head_dim: int | None = None


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
    kv_heads = fields.size("num_key_value_heads", default=defaults.kv_heads or heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: "
            "correct one of them so that every key head serves the same number of query heads"
        )
    dim = _read_head_dim(fields, heads, defaults)
    rope = read_rope(fields, dim, theta=defaults.theta, max_position=read_max_position(fields, defaults))
    return GroupedQueryAttention(
        heads, kv_heads, dim, rope, qk_norm=qk_norm, qkv_bias=bias, out_bias=bias, window=window
    )


def read_windows(fields: Fields, window: int | None, *, default: Sequence[str]) -> list[int | None]:
    """Each layer's window: `window` where `layer_types`, or else `default`, says that it slides."""
    allowed = (FULL, SLIDING) if window else (FULL,)
    kinds = fields.choices("layer_types", default=default, allowed=allowed)
    return [window if kind == SLIDING else None for kind in kinds]


def read_experts(
    fields: Fields, intermediate: int, *, renormalise: bool, names: FeedForwardNames | None = None
) -> FeedForward:
    """Routed experts, chosen by a softmax over all; transformers 4 and 5 name their number differently."""
    experts = fields.size("num_experts", "num_local_experts", maximum=10**5)
    top_k = fields.size("num_experts_per_tok", maximum=experts, maximum_of="the number of experts")
    router = Router(top_k, "softmax", renormalise=renormalise)
    return FeedForward(intermediate, experts, router, names=names or FeedForwardNames())


def read_sparse_layers(fields: Fields, experts: FeedForward) -> list[FeedForward]:
    """Every `decoder_sparse_step`-th layer has these experts, except those in `mlp_only_layers`."""
    layers = range(read_layer_count(fields))
    step, dense = fields.size("decoder_sparse_step", default=1), set(fields.integers("mlp_only_layers"))
    routed = [layer not in dense and (layer + 1) % step == 0 for layer in layers]
    if all(routed):
        return [experts for _ in layers]
    plain = FeedForward(fields.size("intermediate_size"))
    return [experts if is_routed else plain for is_routed in routed]


def read_model(
    fields: Fields,
    model_type: str,
    layers: Sequence[LayerSpec],
    defaults: Defaults,
    names: OuterNames | None = None,
) -> ModelSpec:
    """The whole decoder around its layers: RMSNorm everywhere, SiLU, no bias on the head.

    How its weights are quantised is no part of it: `hybrid.weights.checkpoints.published` reads or refuses that.
    """
    fields.choice("hidden_act", default="silu", allowed=("silu",))
    return ModelSpec(
        model_type=model_type,
        vocab=fields.size("vocab_size", maximum=10**8),
        hidden=fields.size("hidden_size"),
        layers=tuple(layers),
        eps=fields.number("rms_norm_eps", default=defaults.eps),
        max_position=read_max_position(fields, defaults),
        tied=fields.flag("tie_word_embeddings"),
        names=names or OuterNames(),
    )


def read_layer_count(fields: Fields) -> int:
    return fields.size("num_hidden_layers", maximum=10_000)


def read_max_position(fields: Fields, defaults: Defaults) -> int:
    return fields.size("max_position_embeddings", default=defaults.max_position, maximum=10**9)


def _read_head_dim(fields: Fields, heads: int, defaults: Defaults) -> int:
    hidden = fields.size("hidden_size")
    if not fields.has("head_dim") and defaults.head_dim is None and hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads} and "
            "head_dim is missing: correct one of them or add head_dim"
        )
    dim = fields.size("head_dim", default=defaults.head_dim or hidden // heads)
    if dim % 2:
        raise ConfigError(
            f"config.json: the head dimension {dim} is odd, and rotary embedding turns pairs: "
            "correct head_dim, or hidden_size and num_attention_heads"
        )
    return dim
