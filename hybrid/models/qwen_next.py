"""What Qwen3-Next and Qwen3.5 share: layers of Gated DeltaNet and of gated attention, norms less 1, shared experts."""

from __future__ import annotations

from dataclasses import replace

import cpu_kernels
from hybrid.errors import ConfigError
from hybrid.models.decoder import FULL, Defaults, read_attention, read_experts, read_layer_count, read_model
from hybrid.models.layers.base import Mixer
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.gated_delta import GatedDeltaNames, GatedDeltaNet
from hybrid.models.layers.head_gate import HeadGate
from hybrid.models.reading import Fields
from hybrid.models.spec import LayerSpec, ModelSpec

LINEAR = "linear_attention"  # word of `layer_types`
# By family: what its config.json may leave out, as `transformers` does.
NEXT = Defaults(max_position=32_768, kv_heads=2, head_dim=256, rope_part=0.25)
DENSE = replace(NEXT, kv_heads=4)
APART = GatedDeltaNames(grouped="", grouped_decays="")  # every projection is a tensor of its own


def read_mixers(fields: Fields, defaults: Defaults, names: GatedDeltaNames) -> list[Mixer]:
    """Of every layer: every `full_attention_interval`-th attends, if `layer_types` does not say it."""
    fields.refuse("attn_output_gate", neutral=True)
    attention = read_attention(fields, defaults, qk_norm="head", bias=fields.flag("attention_bias"))
    gated = replace(attention, gate=HeadGate())
    delta = read_delta(fields, names, key_heads=16, value_heads=32, key_dim=128, value_dim=128)
    interval = fields.size("full_attention_interval", default=4)
    default = [LINEAR if (layer + 1) % interval else FULL for layer in range(read_layer_count(fields))]
    kinds = fields.choices("layer_types", default=default, allowed=(FULL, LINEAR))
    return [gated if kind == FULL else delta for kind in kinds]


def read_delta(
    fields: Fields, names: GatedDeltaNames, *, key_heads: int, value_heads: int, key_dim: int, value_dim: int
) -> GatedDeltaNet:
    """Gated DeltaNet; the sizes are defaults."""
    key_heads = fields.size("linear_num_key_heads", default=key_heads)
    value_heads = fields.size("linear_num_value_heads", default=value_heads)
    if value_heads % key_heads:
        raise ConfigError(
            f"config.json: linear_num_value_heads {value_heads} is not a multiple of linear_num_key_heads {key_heads}: "
            "correct one of them so that every key head serves the same number of value heads"
        )
    largest = cpu_kernels.MAX_DELTA_DIM  # of what the kernel holds
    return GatedDeltaNet(
        key_heads,
        value_heads,
        fields.size("linear_key_head_dim", default=key_dim, maximum=largest),
        fields.size("linear_value_head_dim", default=value_dim, maximum=largest),
        fields.size("linear_conv_kernel_dim", default=4, minimum=2, maximum=8),
        fields.flag("linear_value_heads_in_turn"),  # of what GGUF files say; no published configuration has it
        names=names,
    )


def read_shared_experts(fields: Fields, *, renormalise: bool) -> FeedForward:
    """Experts, and one that all rows share, weighed by a gate."""
    experts = read_experts(fields, fields.size("moe_intermediate_size", default=512), renormalise=renormalise)
    return replace(
        experts, shared_intermediate=fields.size("shared_expert_intermediate_size", default=512), shared_gate=True
    )


def read_qwen3_5(fields: Fields, model_type: str, *, dense: bool) -> ModelSpec:
    """A text model of Qwen3.5."""
    defaults = DENSE if dense else NEXT
    half = FeedForward(fields.size("intermediate_size")) if dense else read_shared_experts(fields, renormalise=True)
    layers = [LayerSpec(mixer, half) for mixer in read_mixers(fields, defaults, APART)]
    return replace(read_model(fields, model_type, layers, defaults), norm="rms_less_one")
