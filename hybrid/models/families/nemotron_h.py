"""Nemotron-H and Nemotron 3: a layer is Mamba-2, attention without rope, or a feed-forward or experts without gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import cpu_kernels
from hybrid.models.decoder import (
    MAX_LAYERS,
    Defaults,
    read_attention,
    read_experts,
    read_grouped_sigmoid,
    read_layer_count,
    read_model,
)
from hybrid.models.layers.absent import NoFeedForward, NoMixer
from hybrid.models.layers.base import Mixer
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryNames
from hybrid.models.layers.latent_experts import LatentExperts
from hybrid.models.layers.mamba2 import Mamba2, Mamba2Names
from hybrid.models.layers.router import FeedForwardNames
from hybrid.models.mamba import ATTENDS, MAMBA, with_limits
from hybrid.models.reading import Fields, with_words
from hybrid.models.spec import LayerSpec, ModelSpec, OuterNames
from hybrid.models.tensors import GatedNames

DEFAULTS = Defaults(max_position=4096, eps=1e-5, kv_heads=8, head_dim=128)
WORDS = {"attention_head_dim": "head_dim", "mamba_dt_limit": "time_step_limit"}  # of older configurations
MLP, MOE = "mlp", "moe"  # words of `layers_block_type`, beside those of mixers
LETTERS = {"M": MAMBA[0], "*": ATTENDS[0], "-": MLP, "E": MOE}  # of hybrid_override_pattern
_LAYER = "model.layers.{layer}"
_MIXER = f"{_LAYER}.mixer"
NORM = f"{_LAYER}.norm.weight"
OUTER = OuterNames("model.embeddings.weight", "model.norm_f.weight")
ATTENTION = GroupedQueryNames(
    norm=NORM,
    q=f"{_MIXER}.q_proj.weight",
    k=f"{_MIXER}.k_proj.weight",
    v=f"{_MIXER}.v_proj.weight",
    out=f"{_MIXER}.o_proj.weight",
)
NAMES = Mamba2Names(
    norm=NORM,
    into=f"{_MIXER}.in_proj.weight",
    taps=f"{_MIXER}.conv1d.weight",
    step_bias=f"{_MIXER}.dt_bias",
    decay_rate=f"{_MIXER}.A_log",
    skip=f"{_MIXER}.D",
    group_norm=f"{_MIXER}.norm.weight",
    out=f"{_MIXER}.out_proj.weight",
)
FEED_FORWARD = FeedForwardNames(
    norm=NORM,
    dense=GatedNames("", f"{_MIXER}.up_proj.weight", f"{_MIXER}.down_proj.weight"),
    router=f"{_MIXER}.gate.weight",
    fused_router=f"{_MIXER}.gate.weight",
    experts=GatedNames(
        "",
        f"{_MIXER}.experts.{{expert}}.up_proj.weight",
        f"{_MIXER}.experts.{{expert}}.down_proj.weight",
        f"{_MIXER}.experts.up_proj",
        f"{_MIXER}.experts.down_proj",
    ),
    shared=GatedNames("", f"{_MIXER}.shared_experts.up_proj.weight", f"{_MIXER}.shared_experts.down_proj.weight"),
    correction=f"{_MIXER}.gate.e_score_correction_bias",
    fused_correction=f"{_MIXER}.gate.e_score_correction_bias",
    latent_down=f"{_MIXER}.fc1_latent_proj.weight",
    latent_up=f"{_MIXER}.fc2_latent_proj.weight",
)


def spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(with_words(config, WORDS))
    fields.refuse("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", neutral=False)
    fields.choice("mlp_hidden_act", default="relu2", allowed=("relu2",))
    kinds = _read_kinds(fields)
    halves = {kind: _read_half(fields, kind) for kind in dict.fromkeys(kinds)}
    layers = [_layer(halves[kind]) for kind in kinds]
    names = ("layer_norm_epsilon", "rms_norm_eps")
    model = read_model(fields, "nemotron_h", layers, DEFAULTS, OUTER, activation=("mamba_hidden_act", "silu"))
    return replace(model, eps=fields.number(*names, default=DEFAULTS.eps))


def _layer(half: Mixer | FeedForward) -> LayerSpec:
    """With the other half absent."""
    return LayerSpec(NoMixer(), half) if isinstance(half, FeedForward) else LayerSpec(half, NoFeedForward())


def _read_kinds(fields: Fields) -> list[str]:
    """Of every layer: by words, or by the letters of a pattern, which say how many there are, too."""
    if fields.has("num_hidden_layers"):  # it may be there, and says nothing else
        read_layer_count(fields)
    words = (*MAMBA, *ATTENDS, MLP, MOE)
    for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        if fields.has(name):
            return fields.spelled_out(name, LETTERS, MAX_LAYERS).words(name, allowed=words)
    return [MAMBA[0], MOE, ATTENDS[0], MLP]


def _read_half(fields: Fields, kind: str) -> Mixer | FeedForward:
    if kind in MAMBA:
        return _read_mamba(fields)
    if kind in ATTENDS:
        attention = read_attention(fields, DEFAULTS)
        return replace(attention, rope=None, names=ATTENTION, window=fields.optional_size("sliding_window"))
    if kind == MLP:
        return FeedForward(
            fields.size("intermediate_size", default=21_504), activation="relu_squared", names=FEED_FORWARD
        )
    return _read_experts(fields)


def _read_mamba(fields: Fields) -> Mamba2:
    largest = cpu_kernels.MAX_DELTA_DIM  # of what the kernel holds
    mamba = Mamba2(
        fields.size("mamba_num_heads", default=128),
        fields.size("mamba_head_dim", default=64, maximum=largest),
        fields.size("n_groups", "mamba_n_groups", default=8),
        fields.size("ssm_state_size", default=128, maximum=largest),
        fields.size("conv_kernel", "mamba_d_conv", default=4, minimum=2, maximum=8),
        conv_bias=fields.flag("use_conv_bias", "mamba_conv_bias", default=True),
        names=NAMES,
    )
    return with_limits(fields, mamba)


def _read_experts(fields: Fields) -> FeedForward:
    """Chosen by corrected sigmoids, as DeepSeek-V3 does; one of its own size for all rows."""
    fields.refuse("n_shared_experts", neutral=1)
    renormalise = fields.flag("norm_topk_prob", default=True)
    experts = read_experts(
        fields, fields.size("moe_intermediate_size", default=7688), renormalise=renormalise, names=FEED_FORWARD
    )
    chosen = read_grouped_sigmoid(fields, experts, scale=1.0)
    shared = fields.size("moe_shared_expert_intermediate_size", default=7688)
    chosen = replace(chosen, activation="relu_squared", shared_intermediate=shared)
    latent = fields.optional_size("moe_latent_size", maximum=10**6)
    return LatentExperts.of(chosen, latent) if latent else chosen
