"""Ling and Ring 3.0: Kimi Delta Attention in most layers, latent attention with gates in the others; grouped sigmoids.

Layers for the prediction of further tokens, which a checkpoint has behind its last one, are not used.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any, TypeVar

from hybrid.errors import ConfigError
from hybrid.models.decoder import FULL, SHARED_EXPERTS, Defaults, read_layer_count, read_model
from hybrid.models.deepseek import read_latent_attention, read_named_layers, read_sigmoid_experts
from hybrid.models.kimi_delta import LINEAR, read_kimi_delta, read_lower_bound
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.gated_latent import GatedLatentAttention
from hybrid.models.layers.kimi_delta import KimiDeltaAttention, KimiDeltaNames
from hybrid.models.layers.latent_names import LatentNames
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import LayerSpec, ModelSpec, OuterNames

DEFAULTS = Defaults(max_position=262_144, theta=6e6)
WORDS = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "score_function": "scoring_func",
}
_MIXER = "model.layers.{layer}.attention"
_Names = TypeVar("_Names", LatentNames, KimiDeltaNames)


def _named(names: _Names, **changes: str) -> _Names:
    """Names of a mixer, in the module that a checkpoint has it in."""
    own = {name.name: getattr(names, name.name).replace(".self_attn.", ".attention.") for name in fields_of(names)}
    return replace(names, **own | changes)


LATENT = _named(LatentNames(), out=f"{_MIXER}.dense.weight")
DELTA = _named(KimiDeltaNames(), decays=f"{_MIXER}.f_proj.weight", gates=f"{_MIXER}.g_proj.weight")
EXPERTS = replace(SHARED_EXPERTS, correction="model.layers.{layer}.mlp.gate.expert_bias")


def spec(config: Mapping[str, Any]) -> ModelSpec:
    words = with_words(config, WORDS)
    words.pop("partial_rotary_factor", None)  # what turns has a size of its own
    fields = Fields(words)
    _refuse_older(config)
    _refuse_others(fields)
    attention = read_latent_attention(fields, DEFAULTS, q_rank=None, nope_dim=128, value_dim=128)
    gated = GatedLatentAttention.of(replace(attention, names=LATENT), f"{_MIXER}.g_proj.weight")
    delta = _read_delta(fields)
    mixers = [gated if kind == FULL else delta for kind in _kinds(fields)]
    halves = _bounded(fields, read_named_layers(fields, _experts(fields), dense=2))
    layers = [LayerSpec(mixer, half) for mixer, half in zip(mixers, halves, strict=True)]
    return read_model(fields, "bailing_hybrid", layers, DEFAULTS, OuterNames(embedding="model.word_embeddings.weight"))


def _refuse_older(config: Mapping[str, Any]) -> None:
    """Ling and Ring 2.5 and 2.6 have the same `model_type`."""
    named = config.get("architectures")
    if isinstance(named, list) and any("V2" in name for name in named if isinstance(name, str)):
        raise ConfigError(
            f"config.json: architectures is {reprlib.repr(named)}; that is Ling or Ring before 3.0, whose layers have "
            "lightning attention, which is not computed: take a checkpoint of Ling or Ring 3.0"
        )


def _refuse_others(fields: Fields) -> None:
    """What models of this family could have been, and were not published as."""
    fields.choice("linear_attention", default="kda", allowed=("kda",))
    fields.refuse("use_kda_lora", "use_mla_nope", "value_norm", "scale_router_input", "use_qkv_bias", neutral=False)
    fields.refuse("use_bias", "use_sliding_window", neutral=False)
    fields.refuse("no_kda_lora", "use_qk_norm", "use_rmsnorm", "moe_router_enable_expert_bias", neutral=True)
    fields.refuse("moe_router_enable_shared_expert", "moe_router_enable_routed_scaling", neutral=True)
    fields.refuse("num_kv_heads_for_linear_attn", neutral=0)
    fields.choice("gated_attention_proj_granularity_type", default="head_wise", allowed=("head_wise",))


def _read_delta(fields: Fields) -> KimiDeltaAttention:
    """`transformers` saves the size of heads that turn as `head_dim`, and this one as `linear_head_dim`."""
    dim = "linear_head_dim" if fields.has("linear_head_dim") else "head_dim"
    delta = read_kimi_delta(fields, fields.size("num_attention_heads"), dim, "short_conv_kernel_size", DELTA)
    if not fields.flag("kda_safe_gate", default=True):
        return delta
    return replace(delta, lower_bound=read_lower_bound(fields, "kda_lower_bound"))


def _kinds(fields: Fields) -> list[str]:
    """Of every layer: by name, or the last of each `layer_group_size` attends."""
    group, layers = fields.size("layer_group_size", default=6), range(1, read_layer_count(fields) + 1)
    default = [LINEAR if layer % group else FULL for layer in layers]
    return fields.choices("layer_types", default=default, allowed=(FULL, LINEAR))


def _experts(fields: Fields) -> FeedForward:
    experts = replace(read_sigmoid_experts(fields, scale=2.5, groups=(8, 4)), names=EXPERTS)
    fields.refuse("moe_shared_expert_intermediate_size", neutral=experts.shared_intermediate)
    return experts


def _bounded(fields: Fields, halves: list[FeedForward]) -> list[FeedForward]:
    """With the bounds that layers of experts have, which `transformers` leaves out."""
    bounds, shared = (fields.limits(f"{which}_swiglu_limit_list", len(halves)) for which in ("expert", "share_expert"))
    return [
        replace(half, bound=bound, shared_bound=of_shared) if half.is_moe else half
        for half, bound, of_shared in zip(halves, bounds, shared, strict=True)
    ]
