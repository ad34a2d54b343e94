"""How rows choose experts, and what a checkpoint calls the tensors of a feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hybrid.models.layers.expert_sets import IDS, ROUTED, SHARED, WEIGHTS, group_rows
from hybrid.models.layers.products import score
from hybrid.models.tensors import GatedNames, gated_names
from hybrid.ops import Buffer, Choice, Op, Weight

RouterKind = Literal["softmax", "topk_softmax", "sigmoid", "sparsemixer", "root_softplus"]
_PREFIX = "model.layers.{layer}.mlp"
LOGITS = "router_logits"  # buffer: scores of all experts


@dataclass(frozen=True)
class Router:
    """How a row chooses experts. softmax: over all experts, then top_k of them. topk_softmax: over the top_k alone.
    sigmoid: of each score, then top_k of them. sparsemixer: one after the other the largest score, which
    weighs its share in a softmax over those left that are closer to it than 2 * `jitter`, relative to their size.
    root_softplus: the root of ln(1 + e^score) of each, then top_k of them.

    correction: whether a number for each expert is added to its score for the choice alone. groups: of experts, as
    many in each; only those of the best `top_groups` groups are chosen among: those of the largest probabilities, or of
    the two sigmoids that are largest together. expert_scales: whether the weight of each expert is multiplied by a
    number of its own, last of all. logit_cap: between which and less itself a tangent keeps scores, first of all; 0: no
    bounds. by_token: 0, or the rows of a table that says which experts every token has; scores only weigh them.
    """

    top_k: int
    kind: RouterKind = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0
    expert_scales: bool = False
    logit_cap: float = 0.0
    by_token: int = 0


@dataclass(frozen=True)
class FeedForwardNames:
    """Names in a checkpoint. fused_router, fused_correction: the names of both beside fused experts; fused_shared: the
    same of the shared expert, None if it has no others there. correction_row: whether corrections are a matrix of one
    row. norm, post_norm: of what it reads, and of what it adds to the residual stream; empty where that is not normed.
    router_norm: of what the router alone reads; empty where that is what experts read. factor: a number by which the
    residual stream is multiplied behind the layer; empty: none. sum_norm: of what experts and a dense feed-forward
    beside them make together. by_token: of the table of the experts of tokens. latent_down, latent_up: of projections
    to latents that experts read, and back.
    """

    norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    dense: GatedNames = gated_names(_PREFIX)
    router: str = f"{_PREFIX}.gate.weight"
    fused_router: str = f"{_PREFIX}.gate.weight"
    experts: GatedNames = GatedNames(
        f"{_PREFIX}.experts.{{expert}}.gate_proj.weight",
        f"{_PREFIX}.experts.{{expert}}.up_proj.weight",
        f"{_PREFIX}.experts.{{expert}}.down_proj.weight",
        f"{_PREFIX}.experts.gate_up_proj",
        f"{_PREFIX}.experts.down_proj",
    )
    shared: GatedNames = gated_names(f"{_PREFIX}.shared_expert")
    fused_shared: GatedNames | None = None
    shared_gate: str = f"{_PREFIX}.shared_expert_gate.weight"
    correction: str = f"{_PREFIX}.gate.e_score_correction_bias"
    fused_correction: str = f"{_PREFIX}.gate.e_score_correction_bias"
    correction_row: bool = False
    post_norm: str = ""
    router_norm: str = ""
    expert_scales: str = ""
    factor: str = ""
    sum_norm: str = ""
    by_token: str = ""
    latent_down: str = ""
    latent_up: str = ""


def route(router: Router, prefix: str, hidden: int, experts: int, shared_gate: bool) -> Iterator[Op]:
    """Scores rows, and gives each its experts. prefix: how the names of the layer's tensors in a store begin.
    shared_gate: whether a last score weighs a shared expert.
    """
    weight, scores = f"{prefix}.router", experts + shared_gate
    yield score("moe", weight, LOGITS, scores, hidden, "experts", bias=router.bias)
    choose = {
        "logits": Buffer(LOGITS),
        "ids": Buffer(IDS),
        "weights": Buffer(WEIGHTS),
        "shared_weights": Buffer(f"{SHARED}.weights") if shared_gate else None,
        "experts": experts,
        "top_k": router.top_k,
        "renormalise": router.renormalise,
        "scoring": Choice("Scoring", router.kind),
        "scale": router.scale,
        "correction": Weight(f"{weight}_correction") if router.correction else None,
        "groups": router.groups if router.groups > 1 else 0,
        "top_groups": router.top_groups,
    }
    if router.kind == "sparsemixer":
        choose["jitter"] = router.jitter
    if router.logit_cap:
        choose["logit_cap"] = router.logit_cap
    if router.by_token:
        choose["by_token"] = Weight(f"{weight}_by_token")
    if router.expert_scales:
        choose["expert_scales"] = Weight(f"{prefix}.expert_scales")
    yield Op("topk", "moe", choose, (0, "rows"))
    yield group_rows("moe", ROUTED, experts, router.top_k)
