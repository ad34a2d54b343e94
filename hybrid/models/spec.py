"""ModelSpec: what a model is, as data. Families fill it from config.json; the planner and the packer read it.

It has room for every kind named in `docs/extending.md`; the planner refuses those that no kernel implements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

AttentionKind = Literal["gqa", "mla", "linear"]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
NormKind = Literal["rms", "layer"]
QkNorm = Literal["none", "head", "whole"]
Activation = Literal["silu", "swiglu_clamped", "gelu"]
RouterKind = Literal["softmax", "topk_softmax", "sigmoid", "sparsemixer"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. `parameters` are the type's own (factor, beta_fast, ...), for `hybrid.models.rope`.

    dim: how many leading dimensions of a head rotate (partial rope: less than head_dim). interleaved: pairs
    are (2i, 2i+1) instead of (i, i + dim/2). max_position: max_position_embeddings of the checkpoint.
    """

    theta: float
    dim: int
    kind: RopeKind = "default"
    interleaved: bool = False
    max_position: int = 0
    parameters: tuple[tuple[str, float | bool | tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class NormSpec:
    """`rms`: x * rsqrt(mean(x^2) + eps) * weight (weight + 1 when zero_centred). `layer`: LayerNorm, bias."""

    eps: float
    kind: NormKind = "rms"
    zero_centred: bool = False


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek): ranks and head parts."""

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention. window: a query sees the last `window` tokens, itself included; None: all."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    kind: AttentionKind = "gqa"
    v_head_dim: int | None = None  # None: head_dim
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    sinks: bool = False
    output_gate: bool = False
    scale: float | None = None  # softmax scale; None: head_dim ** -0.5
    mla: MlaSpec | None = None


@dataclass(frozen=True)
class RouterSpec:
    """How a token chooses experts.

    softmax: softmax over all experts, take top_k. topk_softmax: take top_k logits, softmax over those.
    sigmoid: sigmoid scores, bias for selection only, groups. sparsemixer: Phi-3.5-MoE.
    """

    top_k: int
    kind: RouterKind = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    bias: bool = False
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0


@dataclass(frozen=True)
class FeedForwardSpec:
    """Gated feed-forward. Dense when experts == 0: `intermediate` is the layer's own, without a router."""

    intermediate: int
    experts: int = 0
    router: RouterSpec | None = None
    activation: Activation = "silu"
    bias: bool = False
    shared_intermediate: int = 0  # 0: no shared expert
    shared_gate: bool = False

    @property
    def is_moe(self) -> bool:
        return self.experts > 0


@dataclass(frozen=True)
class LayerSpec:
    attention: AttentionSpec
    feed_forward: FeedForwardSpec


@dataclass(frozen=True)
class TensorNames:
    """Checkpoint names by role. `{layer}` and `{expert}` are filled in; empty: the family has no such tensor.

    Fused experts, as transformers 5 holds them, are [experts, 2 * intermediate, hidden] (gate rows, then up
    rows, or with fused_alternate gate row 0, up row 0, gate row 1, ...) and [experts, hidden, intermediate];
    with fused_transposed the last two dimensions of both are the other way round. fused_router is the router's
    name beside them. Fused experts in mxfp4 have `_blocks` and `_scales` added to their names, are never
    transposed, and biases of fused experts have `_bias`. A reader takes whichever form the checkpoint has.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    attention_norm: str = "model.layers.{layer}.input_layernorm.weight"
    q: str = "model.layers.{layer}.self_attn.q_proj.weight"
    k: str = "model.layers.{layer}.self_attn.k_proj.weight"
    v: str = "model.layers.{layer}.self_attn.v_proj.weight"
    out: str = "model.layers.{layer}.self_attn.o_proj.weight"
    q_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
    feed_forward_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    gate: str = "model.layers.{layer}.mlp.gate_proj.weight"
    up: str = "model.layers.{layer}.mlp.up_proj.weight"
    down: str = "model.layers.{layer}.mlp.down_proj.weight"
    router: str = "model.layers.{layer}.mlp.gate.weight"
    expert_gate: str = "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
    expert_up: str = "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    expert_down: str = "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    fused_router: str = "model.layers.{layer}.mlp.gate.weight"
    fused_gate_up: str = "model.layers.{layer}.mlp.experts.gate_up_proj"
    fused_down: str = "model.layers.{layer}.mlp.experts.down_proj"
    fused_alternate: bool = False
    fused_transposed: bool = False
    shared_gate_proj: str = "model.layers.{layer}.mlp.shared_expert.gate_proj.weight"
    shared_up_proj: str = "model.layers.{layer}.mlp.shared_expert.up_proj.weight"
    shared_down_proj: str = "model.layers.{layer}.mlp.shared_expert.down_proj.weight"
    shared_gate: str = "model.layers.{layer}.mlp.shared_expert_gate.weight"
    sinks: str = "model.layers.{layer}.self_attn.sinks"


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. Biases take the name of their weight with `.weight` replaced by `.bias`."""

    model_type: str
    vocab: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    max_position: int
    tied: bool = False  # the output head is the embedding
    head_bias: bool = False
    names: TensorNames = field(default_factory=TensorNames)
