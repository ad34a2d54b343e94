"""The tensors that a checkpoint of a spec must have, by name and shape, in each form of its experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from hybrid.formats.block import GROUP
from hybrid.models.spec import FeedForwardSpec, LayerSpec, ModelSpec, TensorNames

Shapes = Iterator[tuple[str, tuple[int, ...]]]
# Experts as tensors of their own; stacked in 3-D tensors; stacked in mxfp4 blocks.
ExpertForm = Literal["apart", "fused", "mxfp4"]


def tensor_shapes(spec: ModelSpec, form: ExpertForm = "apart") -> Shapes:
    """Name and shape of every tensor that a checkpoint of `spec` has, with its experts in this form."""
    names = spec.names
    yield names.embedding, (spec.vocab, spec.hidden)
    for index, layer in enumerate(spec.layers):
        shapes = [*_attention_shapes(spec, layer), *_feed_forward_shapes(spec, layer, form)]
        yield from ((name.format(layer=index), shape) for name, shape in shapes)
    yield names.final_norm, (spec.hidden,)
    if not spec.tied:
        yield names.head, (spec.vocab, spec.hidden)


def bias_name(weight: str) -> str:
    """The name of the bias beside a weight; fused experts have no `.weight` to replace."""
    return weight.removesuffix(".weight") + (".bias" if weight.endswith(".weight") else "_bias")


def _attention_shapes(spec: ModelSpec, layer: LayerSpec) -> Shapes:
    names, attention, hidden = spec.names, layer.attention, spec.hidden
    width, kv_width = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    yield names.attention_norm, (hidden,)
    for name, rows in ((names.q, width), (names.k, kv_width), (names.v, kv_width)):
        yield name, (rows, hidden)
        if attention.qkv_bias:
            yield bias_name(name), (rows,)
    yield names.out, (hidden, width)
    if attention.out_bias:
        yield bias_name(names.out), (hidden,)
    if attention.qk_norm == "head":
        yield names.q_norm, (attention.head_dim,)
        yield names.k_norm, (attention.head_dim,)
    if attention.sinks:
        yield names.sinks, (attention.heads,)


def _feed_forward_shapes(spec: ModelSpec, layer: LayerSpec, form: ExpertForm) -> Shapes:
    names, ffn, hidden = spec.names, layer.feed_forward, spec.hidden
    yield names.feed_forward_norm, (hidden,)
    if not ffn.is_moe:
        yield from _gated((names.gate, names.up, names.down), hidden, ffn.intermediate, ffn.bias)
        return
    router = names.router if form == "apart" else names.fused_router
    yield router, (ffn.experts, hidden)
    if ffn.router and ffn.router.bias:
        yield bias_name(router), (ffn.experts,)
    if form != "apart":
        yield from _fused(names, ffn, hidden, form)
    else:
        for expert in range(ffn.experts):
            apart = (names.expert_gate, names.expert_up, names.expert_down)
            numbered = [name.replace("{expert}", str(expert)) for name in apart]
            yield from _gated(numbered, hidden, ffn.intermediate, ffn.bias)
    if ffn.shared_intermediate:
        shared = (names.shared_gate_proj, names.shared_up_proj, names.shared_down_proj)
        yield from _gated(shared, hidden, ffn.shared_intermediate, False)
    if ffn.shared_gate:
        yield names.shared_gate, (1, hidden)


def _gated(names: tuple[str, ...] | list[str], hidden: int, intermediate: int, bias: bool) -> Shapes:
    wide, narrow = (intermediate, hidden), (hidden, intermediate)
    for name, shape in zip(names, (wide, wide, narrow), strict=True):
        yield name, shape
        if bias:
            yield bias_name(name), shape[:1]


def _fused(names: TensorNames, ffn: FeedForwardSpec, hidden: int, form: ExpertForm) -> Shapes:
    for name, rows, columns in (
        (names.fused_gate_up, 2 * ffn.intermediate, hidden),
        (names.fused_down, hidden, ffn.intermediate),
    ):
        if form == "fused":
            yield name, (ffn.experts, *((columns, rows) if names.fused_transposed else (rows, columns)))
        else:
            groups = -(-columns // GROUP)
            yield f"{name}_blocks", (ffn.experts, rows, groups, 16)
            yield f"{name}_scales", (ffn.experts, rows, groups)
        if ffn.bias:
            yield bias_name(name), (ffn.experts, rows)
