"""The op list of a step: a flat sequence over named buffers and weights, the same for every step of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cpu_kernels import KEY_BLOCK
from hybrid.models.spec import LayerSpec, ModelSpec, RopeSpec
from hybrid.weights.layout import BLOCK, K_ALIGN, down_offset, expert_elements, qkv_width, round_up

STATE_EXTRA = BLOCK  # floats behind the sums of a partial state: maximum and denominator, padded


@dataclass(frozen=True)
class Buffer:
    """Address of a named part of the arena."""

    name: str


@dataclass(frozen=True)
class Weight:
    """Address of a tensor of the store, `offset` bytes into it."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Kv:
    """The KV layout of a layer."""

    layer: int


@dataclass(frozen=True)
class RoutingTable:
    """The five arrays that say which rows go to which expert, `name`.offsets and so on."""

    name: str


@dataclass(frozen=True)
class Op:
    """One kernel call. `arguments` are numbers or one of the references above; None is a null address.

    split: how many independent units the threads share, and what they are called.
    """

    kind: str
    part: str
    arguments: dict[str, Any]
    split: tuple[int, str]
    layer: int | None = None


def row_stride(width: int) -> int:
    """Elements from one row of a buffer to the next: rows are padded with zeros to what packed matrices expect."""
    return round_up(width, K_ALIGN)


def pairs(width: int) -> int:
    """Lines in a packed block with `width` inputs."""
    return round_up(width, K_ALIGN) // 2


def ropes(spec: ModelSpec) -> list[RopeSpec]:
    """The distinct ropes of a model, each with one table a step."""
    return list(dict.fromkeys(layer.attention.rope for layer in spec.layers if layer.attention.rope))


def key_dim(layer: LayerSpec) -> int:
    return round_up(layer.attention.head_dim, K_ALIGN)


def value_dim(layer: LayerSpec) -> int:
    return round_up(layer.attention.head_dim, BLOCK)


def build_buffers(spec: ModelSpec, rows: int, slots: int, tokens: int) -> dict[str, int]:
    """Bytes of every buffer of the arena, for steps of at most `rows` rows and slots of `tokens` tokens.

    All layers share their intermediates, so each is as large as its largest layer needs.
    """
    layers = spec.layers
    moe = [layer.feed_forward for layer in layers if layer.feed_forward.is_moe]
    hidden = row_stride(spec.hidden)
    sizes = {
        "residual": rows * hidden * 4,
        "normed": rows * hidden * 2,
        "qkv": rows * max(row_stride(qkv_width(layer)) for layer in layers) * 4,
        "q": rows * max(layer.attention.heads * key_dim(layer) for layer in layers) * 2,
        "attended": rows * max(row_stride(_heads_width(layer)) for layer in layers) * 2,
        "states": slots * -(-tokens // KEY_BLOCK) * max(map(_state_floats, layers)) * 4,
        "activation": rows * max(_expert_rows(layer) * _act_stride(layer) for layer in layers) * 2,
    }
    for i, rope in enumerate(ropes(spec)):
        sizes[f"rope{i}"] = rows * rope.dim * 4
        sizes[f"rope{i}.frequencies"] = rope.dim * 2
    if moe:
        experts = max(ffn.experts for ffn in moe)
        top_k = max(ffn.router.top_k for ffn in moe if ffn.router)
        sizes["normed_f32"] = rows * hidden * 4
        sizes["router_logits"] = rows * experts * 4
        sizes["expert_ids"] = sizes["expert_weights"] = rows * top_k * 4
        sizes |= _routing_sizes("routing", rows * top_k, experts)
    if len(moe) < len(layers):
        sizes |= _routing_sizes("dense", rows, 1)
    return sizes


def _routing_sizes(name: str, entries: int, experts: int) -> dict[str, int]:
    return {
        f"{name}.offsets": (experts + 1) * 4,
        f"{name}.rows": entries * 4,
        f"{name}.weights": entries * 4,
        f"{name}.active": experts * 4,
        f"{name}.count": 4,
    }


def _heads_width(layer: LayerSpec) -> int:
    return layer.attention.heads * layer.attention.head_dim


def _state_floats(layer: LayerSpec) -> int:
    return layer.attention.heads * (value_dim(layer) + STATE_EXTRA)


def _expert_rows(layer: LayerSpec) -> int:
    router = layer.feed_forward.router
    return router.top_k if router else 1


def _act_stride(layer: LayerSpec) -> int:
    return row_stride(layer.feed_forward.intermediate)


def build_ops(spec: ModelSpec, rope_factors: list[float]) -> list[Op]:
    """Every op of a step, in order. rope_factors: what the cosines and sines of each of `ropes(spec)` are scaled by."""
    ops = list(_start(spec, rope_factors))
    for index, layer in enumerate(spec.layers):
        ops += _attention(spec, index, layer)
        ops += _feed_forward(spec, index, layer)
    return ops + list(_head(spec))


def _start(spec: ModelSpec, rope_factors: list[float]) -> Iterator[Op]:
    embedding = {
        "table": Weight("embedding"),
        "output": Buffer("residual"),
        "hidden": spec.hidden,
        "pairs": pairs(spec.hidden),
        "output_stride": row_stride(spec.hidden),
    }
    yield Op("embed", "other", embedding, (0, "rows"))
    for i, (rope, factor) in enumerate(zip(ropes(spec), rope_factors, strict=True)):
        table = {
            "inverse_frequencies": Buffer(f"rope{i}.frequencies"),
            "table": Buffer(f"rope{i}"),
            "dim": rope.dim,
            "factor": factor,
        }
        yield Op("rope_table", "other", table, (0, "rows"))
    if any(not layer.feed_forward.is_moe for layer in spec.layers):
        yield _group("other", None, "dense", 1, 1, routed=False)


def _norm(spec: ModelSpec, part: str, weight: str, layer: int | None, f32: bool = False, last: bool = False) -> Op:
    arguments = {
        "input": Buffer("residual"),
        "weight": Weight(weight),
        "output": Buffer("normed"),
        "output_f32": Buffer("normed_f32") if f32 else None,
        "width": spec.hidden,
        "input_stride": row_stride(spec.hidden),
        "output_stride": row_stride(spec.hidden),
        "eps": spec.norm.eps,
        "logit_rows": last,
    }
    return Op("norm", part, arguments, (0, "rows"), layer)


def _gemm(
    part: str, layer: int | None, source: str, weight: str, target: str | None, n: int, k: int, stride: int,
    bias: bool = False, accumulate: bool = False,
) -> Op:  # fmt: skip
    arguments = {
        "input": Buffer(source),
        "weight": Weight(weight),
        "bias": Weight(f"{weight}_bias") if bias else None,
        "output": Buffer(target) if target else None,
        "columns": n,
        "pairs": pairs(k),
        "input_stride": row_stride(k),
        "output_stride": stride,
        "accumulate": accumulate,
    }
    return Op("gemm", part, arguments, (-(-n // BLOCK), "column blocks"), layer)


def _attention(spec: ModelSpec, index: int, layer: LayerSpec) -> Iterator[Op]:
    attention, prefix = layer.attention, f"layers.{index}.attention"
    width, heads = qkv_width(layer), (attention.heads, attention.kv_heads)
    rope = ropes(spec).index(attention.rope) if attention.rope else None
    normed = attention.qk_norm == "head"
    yield _norm(spec, "attention", f"{prefix}.norm", index)
    yield _gemm(
        "attention", index, "normed", f"{prefix}.qkv", "qkv", width, spec.hidden, row_stride(width),
        bias=attention.qkv_bias,
    )  # fmt: skip
    shape = {"kv": Kv(index), "heads": heads[0], "kv_heads": heads[1], "head_dim": attention.head_dim}
    place = {
        "qkv": Buffer("qkv"),
        "rope": Buffer(f"rope{rope}") if rope is not None else None,
        "q_norm": Weight(f"{prefix}.q_norm") if normed else None,
        "k_norm": Weight(f"{prefix}.k_norm") if normed else None,
        "q": Buffer("q"),
        "rope_dim": attention.rope.dim if attention.rope else 0,
        "interleaved": bool(attention.rope and attention.rope.interleaved),
        "qkv_stride": row_stride(width),
        "eps": spec.norm.eps,
    }
    yield Op("qkv", "attention", shape | place, (sum(heads) + heads[1], "heads a row"), index)
    scale = attention.scale if attention.scale is not None else attention.head_dim**-0.5
    attend = {
        "q": Buffer("q"),
        "output": Buffer("attended"),
        "states": Buffer("states"),
        "output_stride": row_stride(_heads_width(layer)),
        "window": attention.window or 0,
        "scale": scale,
    }
    yield Op("attention", "attention", shape | attend, (heads[1], "KV heads a tile and key block"), index)
    yield _gemm(
        "attention", index, "attended", f"{prefix}.out", "residual", spec.hidden, _heads_width(layer),
        row_stride(spec.hidden), bias=attention.out_bias, accumulate=True,
    )  # fmt: skip


def _group(part: str, layer: int | None, routing: str, experts: int, top_k: int, routed: bool = True) -> Op:
    arguments = {
        "ids": Buffer("expert_ids") if routed else None,
        "weights": Buffer("expert_weights") if routed else None,
        "routing": RoutingTable(routing),
        "experts": experts,
        "top_k": top_k,
    }
    return Op("group", part, arguments, (1, "thread"), layer)


def _router(spec: ModelSpec, index: int, layer: LayerSpec) -> Iterator[Op]:
    ffn = layer.feed_forward
    assert ffn.router is not None
    yield Op(
        "router",
        "moe",
        {
            "input": Buffer("normed_f32"),
            "weight": Weight(f"layers.{index}.ffn.router"),
            "logits": Buffer("router_logits"),
            "experts": ffn.experts,
            "hidden": spec.hidden,
            "input_stride": row_stride(spec.hidden),
        },
        (ffn.experts, "experts a block of rows"),
        index,
    )
    yield Op(
        "topk",
        "moe",
        {
            "logits": Buffer("router_logits"),
            "ids": Buffer("expert_ids"),
            "weights": Buffer("expert_weights"),
            "experts": ffn.experts,
            "top_k": ffn.router.top_k,
            "renormalise": ffn.router.renormalise,
            "softmax_after": ffn.router.kind == "topk_softmax",
            "scale": ffn.router.scale,
        },
        (0, "rows"),
        index,
    )
    yield _group("moe", index, "routing", ffn.experts, ffn.router.top_k)


def _feed_forward(spec: ModelSpec, index: int, layer: LayerSpec) -> Iterator[Op]:
    ffn, prefix = layer.feed_forward, f"layers.{index}.ffn"
    routing = RoutingTable("routing" if ffn.is_moe else "dense")
    stride = expert_elements(spec.hidden, ffn.intermediate) * 2
    hidden_stride, act_stride = row_stride(spec.hidden), _act_stride(layer)
    yield _norm(spec, "moe", f"{prefix}.norm", index, f32=ffn.is_moe)
    if ffn.is_moe:
        yield from _router(spec, index, layer)
    blocks = -(-ffn.intermediate // BLOCK)
    gate_up = {
        "input": Buffer("normed"),
        "routing": routing,
        "experts": Weight(f"{prefix}.experts"),
        "output": Buffer("activation"),
        "expert_stride": stride,
        "blocks": blocks,
        "pairs": pairs(spec.hidden),
        "input_stride": hidden_stride,
        "output_stride": act_stride,
    }
    yield Op("gate_up", "moe", gate_up, (blocks, "column blocks an active expert"), index)
    columns = -(-spec.hidden // BLOCK)
    down = {
        "input": Buffer("activation"),
        "routing": routing,
        "experts": Weight(f"{prefix}.experts", down_offset(spec.hidden, ffn.intermediate) * 2),
        "output": Buffer("residual"),
        "expert_stride": stride,
        "blocks": columns,
        "pairs": pairs(ffn.intermediate),
        "input_stride": act_stride,
        "output_stride": hidden_stride,
    }
    yield Op("down", "moe", down, (columns, "column blocks"), index)


def _head(spec: ModelSpec) -> Iterator[Op]:
    yield _norm(spec, "head", "final_norm", None, last=True)
    weight = "embedding" if spec.tied else "head"
    yield _gemm("head", None, "normed", weight, None, spec.vocab, spec.hidden, spec.vocab)
