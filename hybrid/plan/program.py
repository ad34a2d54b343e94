"""The op list of a step: a flat sequence over named buffers and weights, the same for every step of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cpu_kernels import KEY_BLOCK
from hybrid.formats import FORMATS
from hybrid.formats.mix import FormatMix
from hybrid.models.spec import LayerSpec, ModelSpec, RopeSpec
from hybrid.ops import Buffer, Choice, ExpertSet, Kv, Op, RoutingTable, Weight
from hybrid.weights.layout import BLOCK, K_ALIGN, down_offset, expert_bytes, qkv_width, round_up, shares_head

STATE_EXTRA = BLOCK  # floats behind the sums of a partial state: maximum and denominator, padded
KEY_ALIGN = 32  # dimensions of a key are padded to this
SUM_INPUTS = 32  # an int8 activation row has a sum for each so many inputs
SCALE_INPUTS = 256  # and a scale for each so many


def row_stride(width: int) -> int:
    """Elements from one row of a buffer to the next: rows are padded with zeros to what packed matrices expect."""
    return round_up(width, K_ALIGN)


def int8_row_bytes(inputs: int) -> int:
    """Bytes of an int8 activation row: the padded inputs, int32 sums, float32 scales, padded to a cache line."""
    k = row_stride(inputs)
    return round_up(k + k // SUM_INPUTS * 4 + -(-k // SCALE_INPUTS) * 4, 64)


def row_bytes(inputs: int, integer: bool) -> int:
    """Bytes from one row that a product reads to the next: int8 with sums and scales, or bf16."""
    return int8_row_bytes(inputs) if integer else row_stride(inputs) * 2


def pairs(width: int) -> int:
    """Lines in a packed block of bf16 with `width` inputs."""
    return row_stride(width) // 2


def ropes(spec: ModelSpec) -> list[RopeSpec]:
    """The distinct ropes of a model, each with one table a step."""
    return list(dict.fromkeys(layer.attention.rope for layer in spec.layers if layer.attention.rope))


def key_dim(layer: LayerSpec) -> int:
    return round_up(layer.attention.head_dim, KEY_ALIGN)


def value_dim(layer: LayerSpec) -> int:
    return round_up(layer.attention.head_dim, BLOCK)


def feed_forward_format(mix: FormatMix, layer: LayerSpec) -> str:
    return mix.experts if layer.feed_forward.is_moe else mix.dense


def build_buffers(spec: ModelSpec, mix: FormatMix, rows: int, sequences: int, tokens: int) -> dict[str, int]:
    """Bytes of every buffer of the arena, for steps of at most `rows` rows and sequences of `tokens` tokens.

    All layers share their intermediates, so each is as large as its largest layer needs.
    """
    layers = spec.layers
    moe = [layer.feed_forward for layer in layers if layer.feed_forward.is_moe]
    hidden = row_stride(spec.hidden)
    sizes = {
        "residual": rows * hidden * 4,
        "qkv": rows * max(row_stride(qkv_width(layer)) for layer in layers) * 4,
        "q": rows * max(layer.attention.heads * key_dim(layer) for layer in layers) * 2,
        "states": sequences * -(-tokens // KEY_BLOCK) * max(map(_state_floats, layers)) * 4,
    }
    sizes |= _input_sizes(spec, mix, rows)
    for i, rope in enumerate(ropes(spec)):
        sizes[f"rope{i}"] = rows * rope.dim * 4
        sizes[f"rope{i}.frequencies"] = rope.dim * 2
    if moe:
        experts = max(ffn.experts for ffn in moe)
        top_k = max(ffn.router.top_k for ffn in moe if ffn.router)
        sizes["normed_f32"] = rows * hidden * 4
        sizes["router_logits"] = rows * max(ffn.experts + ffn.shared_gate for ffn in moe) * 4
        sizes["expert_ids"] = sizes["expert_weights"] = rows * top_k * 4
        sizes |= _routing_sizes("routing", rows * top_k, experts)
    for name in _whole_routings(spec):
        sizes |= _routing_sizes(name, rows, 1)
    return sizes


def _input_sizes(spec: ModelSpec, mix: FormatMix, rows: int) -> dict[str, int]:
    """Buffers of the rows that products read. A norm writes the kind that is read; others bf16, to be quantised."""
    sizes: dict[str, int] = {}
    for name, width, count, format in _product_inputs(spec, mix):
        integer = FORMATS[format].integer
        for kind in {integer} if name == "normed" else {integer, False}:
            buffer = _input_name(name, width, kind)
            sizes[buffer] = max(sizes.get(buffer, 0), rows * count * row_bytes(width, kind))
    return dict(sorted(sizes.items()))


def _product_inputs(spec: ModelSpec, mix: FormatMix) -> Iterator[tuple[str, int, int, str]]:
    """(name, inputs, rows for each row of the step, format of the weights) of what every product reads."""
    yield "normed", spec.hidden, 1, mix.head
    for layer in spec.layers:
        yield "normed", spec.hidden, 1, mix.attention
        yield "attended", _heads_width(layer), 1, mix.attention
        for experts in _expert_groups(mix, layer):
            yield "normed", spec.hidden, 1, experts.format
            yield experts.activation, experts.intermediate, experts.rows, experts.format


def _input_name(name: str, width: int, integer: bool) -> str:
    """Rows of different widths lie apart: what pads a row stays zero only if no wider row is ever written there."""
    return f"{name}{'8' if integer else ''}.{width}"


def _input(name: str, width: int, format: str) -> tuple[Buffer, int]:
    """Where a product with weights of this format finds its rows, and bytes from one to the next."""
    integer = FORMATS[format].integer
    return Buffer(_input_name(name, width, integer)), row_bytes(width, integer)


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


@dataclass(frozen=True)
class _Experts:
    """Experts of one format and size: the routed ones, the only one of a dense layer, or the shared one."""

    name: str  # of their tensor
    format: str
    intermediate: int
    routing: str
    rows: int  # that they get for each row of the step
    activation: str  # buffer of what down reads
    bias: bool


def _expert_groups(mix: FormatMix, layer: LayerSpec) -> list[_Experts]:
    """Those that a row chooses among, then the shared expert if there is one."""
    ffn = layer.feed_forward
    place = ("routing", ffn.router.top_k) if ffn.router else ("dense", 1)
    routed = _Experts("experts", feed_forward_format(mix, layer), ffn.intermediate, *place, "activation", ffn.bias)
    if not ffn.shared_intermediate:
        return [routed]
    place = ("shared" if ffn.shared_gate else "dense", 1)
    return [routed, _Experts("shared", mix.shared, ffn.shared_intermediate, *place, "shared_activation", False)]


def _whole_routings(spec: ModelSpec) -> list[str]:
    """Tables that send every row to one expert: with weight 1, or with one that a gate gives it in each layer."""
    ffns = [layer.feed_forward for layer in spec.layers]
    ones = any(not ffn.is_moe or (ffn.shared_intermediate and not ffn.shared_gate) for ffn in ffns)
    return ["dense"] * ones + ["shared"] * any(ffn.shared_gate for ffn in ffns)


def build_ops(spec: ModelSpec, mix: FormatMix, rope_factors: list[float]) -> list[Op]:
    """Every op of a step, in order. rope_factors: what the cosines and sines of each of `ropes(spec)` are scaled by."""
    ops = list(_start(spec, rope_factors))
    for index, layer in enumerate(spec.layers):
        ops += _attention(spec, mix.attention, index, layer)
        ops += _feed_forward(spec, mix, index, layer)
    return ops + list(_head(spec, mix))


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
    for name in _whole_routings(spec):
        yield _group("other", None, name, 1, 1, routed=False)


def _norm(
    spec: ModelSpec, part: str, weight: str, layer: int | None, *formats: str, f32: bool = False, last: bool = False
) -> Op:
    """Writes rows for the products with weights of `formats` that follow."""
    inputs = {FORMATS[format].integer: _input("normed", spec.hidden, format) for format in formats}
    output, _ = inputs.get(False, (None, 0))
    output8, stride = inputs.get(True, (None, 0))
    arguments = {
        "input": Buffer("residual"),
        "weight": Weight(weight),
        "output": output,
        "output8": output8,
        "output_f32": Buffer("normed_f32") if f32 else None,
        "width": spec.hidden,
        "input_stride": row_stride(spec.hidden),
        "output_stride": row_stride(spec.hidden),
        "output8_stride": stride,
        "eps": spec.norm.eps,
        "logit_rows": last,
    }
    return Op("norm", part, arguments, (0, "rows"), layer)


def _quantise(part: str, layer: int, name: str, width: int, format: str, multiple: int = 1) -> Iterator[Op]:
    """bf16 rows to int8 ones, where the product that reads them multiplies integers."""
    if not FORMATS[format].integer:
        return
    arguments = {
        "input": Buffer(_input_name(name, width, False)),
        "output": Buffer(_input_name(name, width, True)),
        "width": row_stride(width),
        "input_stride": row_bytes(width, False),
        "output_stride": row_bytes(width, True),
        "multiple": multiple,
    }
    yield Op("quantise", part, arguments, (0, "rows"), layer)


def _gemm(
    part: str, layer: int | None, format: str, source: str, weight: str, target: str | None, n: int, k: int,
    stride: int, bias: bool = False, accumulate: bool = False,
) -> Op:  # fmt: skip
    rows, input_stride = _input(source, k, format)
    arguments = {
        "format": Choice("Format", format),
        "input": rows,
        "weight": Weight(weight),
        "bias": Weight(f"{weight}_bias") if bias else None,
        "output": Buffer(target) if target else None,
        "columns": n,
        "inputs": row_stride(k),
        "input_stride": input_stride,
        "output_stride": stride,
        "accumulate": accumulate,
    }
    return Op("gemm", part, arguments, (-(-n // BLOCK), "column blocks"), layer)


def _attention(spec: ModelSpec, format: str, index: int, layer: LayerSpec) -> Iterator[Op]:
    attention, prefix = layer.attention, f"layers.{index}.attention"
    width, heads = qkv_width(layer), (attention.heads, attention.kv_heads)
    rope = ropes(spec).index(attention.rope) if attention.rope else None
    normed = attention.qk_norm == "head"
    yield _norm(spec, "attention", f"{prefix}.norm", index, format)
    yield _gemm(
        "attention", index, format, "normed", f"{prefix}.qkv", "qkv", width, spec.hidden, row_stride(width),
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
        "output": Buffer(_input_name("attended", _heads_width(layer), False)),
        "states": Buffer("states"),
        "sinks": Weight(f"{prefix}.sinks") if attention.sinks else None,
        "output_stride": row_stride(_heads_width(layer)),
        "window": attention.window or 0,
        "scale": scale,
    }
    yield Op("attention", "attention", shape | attend, (heads[1], "KV heads a tile and key block"), index)
    yield from _quantise("attention", index, "attended", _heads_width(layer), format)
    yield _gemm(
        "attention", index, format, "attended", f"{prefix}.out", "residual", spec.hidden, _heads_width(layer),
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
    weight = f"layers.{index}.ffn.router"
    score = {
        "input": Buffer("normed_f32"),
        "weight": Weight(weight),
        "bias": Weight(f"{weight}_bias") if ffn.router.bias else None,
        "logits": Buffer("router_logits"),
        "experts": ffn.experts + ffn.shared_gate,
        "hidden": spec.hidden,
        "input_stride": row_stride(spec.hidden),
    }
    yield Op("router", "moe", score, (ffn.experts + ffn.shared_gate, "experts a block of rows"), index)
    choose = {
        "logits": Buffer("router_logits"),
        "ids": Buffer("expert_ids"),
        "weights": Buffer("expert_weights"),
        "shared_weights": Buffer("shared.weights") if ffn.shared_gate else None,
        "experts": ffn.experts,
        "top_k": ffn.router.top_k,
        "renormalise": ffn.router.renormalise,
        "softmax_after": ffn.router.kind == "topk_softmax",
        "scale": ffn.router.scale,
    }
    yield Op("topk", "moe", choose, (0, "rows"), index)
    yield _group("moe", index, "routing", ffn.experts, ffn.router.top_k)


def _feed_forward(spec: ModelSpec, mix: FormatMix, index: int, layer: LayerSpec) -> Iterator[Op]:
    ffn, prefix, groups = layer.feed_forward, f"layers.{index}.ffn", _expert_groups(mix, layer)
    yield _norm(spec, "moe", f"{prefix}.norm", index, *(experts.format for experts in groups), f32=ffn.is_moe)
    if ffn.is_moe:
        yield from _router(spec, index, layer)
    part = "experts" if ffn.is_moe else "moe"
    yield _gate_up(spec, part, index, layer, groups)
    for experts in groups:
        width = experts.intermediate
        yield from _quantise(part, index, experts.activation, width, experts.format, experts.rows)
    yield _down(spec, part, index, groups)


def _gate_up(spec: ModelSpec, part: str, index: int, layer: LayerSpec, groups: list[_Experts]) -> Op:
    sets = [_expert_set(spec, index, experts, "gate_up") for experts in groups]
    arguments = sets[0] | _activations(groups[0])
    arguments["activation"] = Choice("Activation", layer.feed_forward.activation)
    if len(groups) > 1:
        arguments["shared"] = ExpertSet(sets[1])
        arguments |= {f"shared_{name}": value for name, value in _activations(groups[1]).items()}
    return Op("gate_up", part, arguments, (sets[0]["blocks"], "column blocks an active expert"), index)


def _activations(experts: _Experts) -> dict[str, Any]:
    width = experts.intermediate
    return {"output": Buffer(_input_name(experts.activation, width, False)), "output_stride": row_stride(width)}


def _down(spec: ModelSpec, part: str, index: int, groups: list[_Experts]) -> Op:
    sets = [_expert_set(spec, index, experts, "down") for experts in groups]
    arguments = sets[0] | {"output": Buffer("residual"), "output_stride": row_stride(spec.hidden)}
    if len(groups) > 1:
        arguments["shared"] = ExpertSet(sets[1])
    return Op("down", part, arguments, (sets[0]["blocks"], "column blocks"), index)


def _expert_set(spec: ModelSpec, index: int, experts: _Experts, matrix: str) -> dict[str, Any]:
    """What gate_up or down must know of a group of experts."""
    prefix, first = f"layers.{index}.ffn", matrix == "gate_up"
    wide, narrow = (experts.intermediate, spec.hidden) if first else (spec.hidden, experts.intermediate)
    rows, stride = _input("normed" if first else experts.activation, narrow, experts.format)
    start = 0 if first else down_offset(experts.format, spec.hidden, experts.intermediate)
    return {
        "format": Choice("Format", experts.format),
        "input": rows,
        "input_stride": stride,
        "routing": RoutingTable(experts.routing),
        "experts": Weight(f"{prefix}.{experts.name}", start),
        "bias": Weight(f"{prefix}.{matrix}_bias") if experts.bias else None,
        "expert_stride": expert_bytes(experts.format, spec.hidden, experts.intermediate),
        "blocks": -(-wide // BLOCK),
        "inputs": row_stride(narrow),
    }


def _head(spec: ModelSpec, mix: FormatMix) -> Iterator[Op]:
    yield _norm(spec, "head", "final_norm", None, mix.head, last=True)
    weight = "embedding" if shares_head(spec, mix) else "head"
    yield _gemm("head", None, mix.head, "normed", weight, None, spec.vocab, spec.hidden, spec.vocab)
