"""The op list of every mix of formats: each buffer and weight is used, written before it is read, and large enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from configs import CONFIGS

from hybrid.formats import FORMATS
from hybrid.formats.mix import MIXES, FormatMix, parse_mix
from hybrid.formats.packed import packed_bytes
from hybrid.formats.rows import row_bytes
from hybrid.models import model_spec
from hybrid.models.layers.base import Extents
from hybrid.models.layers.products import UNNORMED
from hybrid.models.layers.rotary import LENGTHS
from hybrid.models.spec import ModelSpec
from hybrid.ops import Buffer, Choice, ExpertSet, Op, RoutingTable, Weight
from hybrid.plan.program import build_buffers, build_ops

ROWS, SEQUENCES, TOKENS = 24, 4, 300
TEXTS = [*MIXES, "bf16,experts=int4", "int8,experts=bf16,dense=bf16", "int4,head=fp8,dense=mxfp4", "bf16,head=int8"]


def spec_of(family: str) -> ModelSpec:
    return model_spec(CONFIGS[family])


def with_biases() -> ModelSpec:
    """A model with sinks and with biases everywhere that a kernel adds them."""
    spec = spec_of("qwen3_moe")
    layers = []
    for layer in spec.layers:
        ffn = replace(layer.feed_forward, bias=True, activation="swiglu_clamped")
        if ffn.router:
            ffn = replace(ffn, router=replace(ffn.router, kind="topk_softmax", bias=True))
        attention = replace(layer.mixer, sinks=True, qkv_bias=True, out_bias=True)
        layers.append(replace(layer, mixer=attention, feed_forward=ffn))
    return replace(spec, layers=tuple(layers))


def with_ungated_shared() -> ModelSpec:
    """A model whose shared expert takes every row with weight 1, and is as wide as the routed ones."""
    spec = spec_of("qwen3_moe")
    layers = []
    for layer in spec.layers:
        ffn = layer.feed_forward
        layers.append(replace(layer, feed_forward=replace(ffn, shared_intermediate=ffn.intermediate * ffn.is_moe)))
    return replace(spec, layers=tuple(layers))


SPECS = {family: spec_of(family) for family in CONFIGS} | {
    "with biases": with_biases(),
    "ungated shared": with_ungated_shared(),
    "one width": model_spec({**CONFIGS["qwen3_moe"], "intermediate_size": 40, "mlp_only_layers": [2]}),
}


def mix_of(text: str) -> FormatMix:
    return parse_mix(text, FormatMix.uniform("bf16"))


def program(spec: ModelSpec, mix: FormatMix) -> tuple[dict[str, int], list[Op]]:
    return build_buffers(spec, mix, Extents(ROWS, SEQUENCES, TOKENS)), build_ops(spec, mix)


def values_of(op: Op) -> Iterator[tuple[str, Any]]:
    """The arguments by name, with those of a second set of experts."""
    for name, value in op.arguments.items():
        yield from value.arguments.items() if isinstance(value, ExpertSet) else [(name, value)]


def sets_of(op: Op) -> Iterator[dict[str, Any]]:
    """The arguments of a product, for each set of experts that it has."""
    yield op.arguments
    if "shared" in op.arguments:
        yield op.arguments["shared"].arguments


def buffers_of(op: Op) -> Iterator[str]:
    for _, value in values_of(op):
        if isinstance(value, Buffer):
            yield value.name
        elif isinstance(value, RoutingTable):
            yield from (f"{value.name}.{part}" for part in ("offsets", "rows", "weights", "active", "count"))


def kinds(ops: list[Op], layer: int) -> list[str]:
    return [op.kind for op in ops if op.layer == layer]


def only(ops: list[Op], kind: str, layer: int | None = None) -> Op:
    (op,) = (op for op in ops if op.kind == kind and op.layer == layer)
    return op


ROW_SIZES = [
    (1, 128, 128, 320), (64, 128, 128, 320), (96, 192, 192, 576), (256, 320, 384, 1152), (320, 384, 512, 1408),
    (2048, 2368, 3072, 8768), (2752, 3200, 4160, 11776),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "int8", "grouped", "wide"), ROW_SIZES)
def test_rows_have_their_inputs_sums_and_scales(inputs, int8, grouped, wide) -> None:
    """By hand: 320 inputs are 320 bytes, 10 sums are 40, 2 scales are 8: 368 bytes in lines of 64. Of a grouped row 10
    scales and three sums each are 160. Of a wide one inputs are 1280 bytes, two sums of each 32 are 80, 2 scales are 8.
    """
    assert tuple(row_bytes(inputs, kind) for kind in ("int8", "grouped", "wide")) == (int8, grouped, wide)


def test_keys_are_padded_to_half_a_line_and_values_to_a_block() -> None:
    layer = spec_of("llama").layers[0]
    assert (layer.mixer.key_dim, layer.mixer.value_dim) == (32, 32)
    layer = replace(layer, mixer=replace(layer.mixer, head_dim=72))
    assert (layer.mixer.key_dim, layer.mixer.value_dim) == (96, 80)


@dataclass(frozen=True)
class Program:
    """The buffers and the ops of a model in a mix."""

    text: str
    spec: ModelSpec
    mix: FormatMix
    buffers: dict[str, int]
    ops: list[Op]


@pytest.fixture(scope="module", params=SPECS)
def programs(request: pytest.FixtureRequest) -> list[Program]:
    """Those of a model in every mix, made once for all tests of them."""
    spec = SPECS[request.param]
    mixes = {text: mix_of(text) for text in TEXTS}
    return [Program(text, spec, mix, *program(spec, mix)) for text, mix in mixes.items()]


def test_there_is_every_buffer_that_an_op_uses_and_no_other(programs) -> None:
    for made in programs:
        assert {buffer for op in made.ops for buffer in buffers_of(op)} == set(made.buffers), made.text
        assert all(size > 0 for size in made.buffers.values()), made.text


def test_the_ops_read_every_tensor_of_the_store_and_no_other(programs) -> None:
    for made in programs:
        used = {value.name for op in made.ops for _, value in values_of(op) if isinstance(value, Weight)}
        assert used == {tensor.name for tensor in made.spec.store_tensors(made.mix)}, made.text


def test_products_lie_within_their_tensors(programs) -> None:
    """A projection is its tensor; the experts are `expert_stride` apart and end with their down matrix."""
    for made in programs:
        assert_products_lie_within_their_tensors(made)


def assert_products_lie_within_their_tensors(made: Program) -> None:
    spec, text = made.spec, made.text
    sizes = {tensor.name: tensor.nbytes for tensor in spec.store_tensors(made.mix)}
    parts: dict[tuple[int | None, str], list[tuple[int, int, int]]] = {}
    for op in made.ops:
        a = op.arguments
        if op.kind == "gemm":
            assert packed_bytes(a["format"].name, a["columns"], a["inputs"]) == sizes[a["weight"].name], text
        for a in sets_of(op) if op.kind in ("gate_up", "down") else ():
            stride, start, name = a["expert_stride"], a["experts"].offset, a["experts"].name
            size = a["blocks"] * FORMATS[a["format"].name].block_bytes(a["inputs"])
            experts = spec.layers[op.layer or 0].feed_forward.experts
            count = max(1, experts) if name.endswith(".ffn.experts") else 1
            assert stride * count == sizes[name], text
            parts.setdefault((op.layer, name), []).append((start, size, stride))
    for (layer, _), ((first, gate, _), (second, down, stride)) in parts.items():
        wide = spec.layers[layer or 0].feed_forward.wide
        assert (first, second, second + down) == (0, wide * gate, stride), text


def test_products_read_rows_of_their_kind_that_fit_their_buffer(programs) -> None:
    for made in programs:
        assert_products_read_rows_of_their_kind(made)


def assert_products_read_rows_of_their_kind(made: Program) -> None:
    for op in made.ops:
        for a in sets_of(op) if op.kind in ("gemm", "gate_up", "down") else ():
            kind = FORMATS[a["format"].name].rows
            buffer, _, width = a["input"].name.partition(".")
            for other, ending in (("int8", "8"), ("grouped", "_grouped"), ("wide", "_wide")):
                assert buffer.endswith(ending) == (kind == other), made.text
            wanted = row_bytes(int(width), kind), -(-int(width) // 64) * 64
            assert (a["input_stride"], a["inputs"]) == wanted, made.text
            router = made.spec.layers[op.layer or 0].feed_forward.router
            routed = router and op.kind == "down" and a is op.arguments and a["experts"].name.endswith(".ffn.experts")
            count = router.top_k if router and routed else 1
            assert ROWS * count * a["input_stride"] <= made.buffers[a["input"].name], made.text


OUTPUTS: dict[str, tuple[str, ...]] = {
    "norm": ("output", "output8", "output_grouped", "output_wide", "output_f32"),
    "topk": ("ids", "weights", "shared_weights"),
    **{"router": ("logits",), "qkv": ("q",), "rope_table": ("table",), "gate_up": ("output", "shared_output")},
    **{"latent": ("plain", "q"), "index": ("q",), "index_scores": ("scores",), "select": ("selected",)},
    **{"block_scores": ("scores",), "select_blocks": ("selected",)},
    **{"select_pools": ("selected", "counts")},
    **{"turn": ("q", "made"), "entry_scores": ("scores",), "see": ("seen", "counts")},
    **{"stream_gates": ("output", "weights"), "ngrams": ("ids",), "ngram_gate": ("gates",)},
    **{"collapse": ("output", "weights", "cleared"), "expand": ("streams",)},
}


def test_rows_are_written_before_they_are_read(programs) -> None:
    for made in programs:
        written: set[str] = set()
        for op in made.ops:
            names = OUTPUTS.get(op.kind, ("output",))
            reads = {v.name for key, v in values_of(op) if isinstance(v, Buffer) and key not in (*names, "states")}
            given = {
                read
                for read in reads
                if read.endswith("frequencies") or read.startswith((LENGTHS, UNNORMED, "ngram_hash"))
            }
            assert reads - given <= written, (made.text, op)
            written |= {v.name for key, v in op.arguments.items() if isinstance(v, Buffer) and key in names}


BEFORE, AFTER = ["norm", "gemm", "qkv", "attention"], ["gemm", "norm"]
ROUTER = ["router", "topk", "group"]


@pytest.mark.parametrize(
    ("text", "attention", "experts", "dense"),
    [
        ("bf16", [], [], []),
        ("fp8", [], [], []),
        ("mxfp4", [], ["quantise"], []),
        ("int8", ["quantise"], ["quantise"], ["quantise"]),
        ("int4", ["quantise"], ["quantise"], ["quantise"]),
        ("bf16,attention=int8", ["quantise"], [], []),
        ("bf16,experts=int4", [], ["quantise"], []),
        ("bf16,dense=int4", [], [], ["quantise"]),
    ],
)
def test_rows_are_quantised_in_front_of_products_of_whole_numbers_alone(text, attention, experts, dense) -> None:
    ops = program(SPECS["qwen3_moe"], mix_of(text))[1]  # its layer 1 is dense
    assert kinds(ops, 0) == [*BEFORE, *attention, *AFTER, *ROUTER, "gate_up", *experts, "down"]
    assert kinds(ops, 1) == [*BEFORE, *attention, *AFTER, "gate_up", *dense, "down"]


def test_quantising_takes_every_row_of_an_expert() -> None:
    """hidden 96, 6 heads of 24, experts of 40 and the dense layer of 72 inputs; top 3 of 10 experts."""
    ops = program(SPECS["qwen3_moe"], FormatMix.uniform("int8"))[1]
    found = [
        (op.layer, op.part, op.arguments["width"], op.arguments["multiple"]) for op in ops if op.kind == "quantise"
    ]
    first, middle, last = ([(i, "attention", 192, 1), (i, part, width, count)] for i, part, width, count in
                           [(0, "experts", 64, 3), (1, "moe", 128, 1), (2, "experts", 64, 3)])  # fmt: skip
    assert found == [*first, *middle, *last]
    experts = [op for op in ops if op.kind == "quantise"][1].arguments
    assert (experts["input"], experts["output"]) == (Buffer("activation.40"), Buffer("activation8.40"))
    assert (experts["input_stride"], experts["output_stride"]) == (128, 128)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("bf16", {"normed.96", "attended.144", "activation.40", "activation.72"}),
        ("fp8", {"normed.96", "attended.144", "activation.40", "activation.72"}),
        (
            "int8",
            {"normed8.96", "attended.144", "attended8.144"}
            | {"activation.40", "activation8.40", "activation.72", "activation8.72"},
        ),
        ("bf16,head=int4", {"normed.96", "normed8.96", "attended.144", "activation.40", "activation.72"}),
        (
            "bf16,experts=int4",
            {"normed.96", "normed8.96", "attended.144", "activation.40", "activation8.40", "activation.72"},
        ),
    ],
)
def test_rows_of_a_kind_are_kept_only_where_something_reads_them(text, names) -> None:
    buffers, _ = program(SPECS["qwen3_moe"], mix_of(text))
    rows = {name: size for name, size in buffers.items() if name.split(".")[0].rstrip("8") in
            ("normed", "attended", "activation")}  # fmt: skip
    assert set(rows) == names
    sizes = {"normed.96": 256, "normed8.96": 192, "attended.144": 384, "attended8.144": 256}
    sizes |= {"activation.40": 3 * 128, "activation8.40": 3 * 128, "activation.72": 256, "activation8.72": 192}
    assert rows == {name: ROWS * sizes[name] for name in names}


def test_a_norm_writes_what_the_next_product_reads() -> None:
    ops = program(SPECS["qwen3_moe"], mix_of("bf16,experts=int8"))[1]
    attention, experts = (op.arguments for op in ops if op.kind == "norm" and op.layer == 0)
    assert (attention["output"], attention["output8"], attention["output_f32"]) == (Buffer("normed.96"), None, None)
    assert (experts["output"], experts["output8"]) == (None, Buffer("normed8.96"))
    assert (experts["output_f32"], experts["output8_stride"]) == (Buffer("normed_f32"), 192)


def test_a_tied_model_has_a_head_of_its_own_once_that_is_quantised() -> None:
    for format in FORMATS:
        head = only(program(SPECS["llama"], mix_of(f"bf16,head={format}"))[1], "gemm")
        assert head.arguments["weight"] == Weight("embedding" if format == "bf16" else "head")
        assert head.arguments["format"] == Choice("Format", format)


@pytest.mark.parametrize(
    ("text", "quantised"),
    [
        ("bf16", []),
        ("int8", ["activation", "shared_activation"]),
        ("bf16,shared=int4", ["shared_activation"]),
        ("int4,shared=bf16", ["activation"]),
    ],
)
def test_a_shared_expert_goes_along_with_the_routed_ones(text, quantised) -> None:
    ops = program(SPECS["qwen2_moe"], mix_of(text))[1]
    found = [op for op in ops if op.layer == 0 and op.part in ("moe", "experts")]
    assert [op.kind for op in found] == ["norm", *ROUTER, "gate_up", *["quantise"] * len(quantised), "down"]
    names = [op.arguments["input"].name.split(".")[0] for op in found if op.kind == "quantise"]
    assert names == quantised
    for op, start in ((only(ops, "gate_up", 0), 0), (only(ops, "down", 0), None)):
        shared = op.arguments["shared"].arguments
        assert shared["experts"].name == "layers.0.ffn.shared" and (start is None or shared["experts"].offset == start)
        assert shared["routing"] == RoutingTable("shared")
    assert "shared" not in only(ops, "down", 1).arguments


def test_the_gate_of_a_shared_expert_is_a_row_of_the_router() -> None:
    ops = program(SPECS["qwen2_moe"], FormatMix.uniform("bf16"))[1]
    assert only(ops, "router", 0).arguments["experts"] == 9
    choose = only(ops, "topk", 0).arguments
    assert (choose["experts"], choose["shared_weights"]) == (8, Buffer("shared.weights"))
    tables = [op.arguments["routing"].name for op in ops if op.kind == "group"]
    assert sorted(tables[:2]) == ["dense", "shared"] and tables[2:] == ["routing"] * 2
    ungated = program(SPECS["ungated shared"], FormatMix.uniform("bf16"))[1]
    assert only(ungated, "topk", 0).arguments["shared_weights"] is None
    assert only(ungated, "down", 0).arguments["shared"].arguments["routing"] == RoutingTable("dense")


def test_a_norm_writes_both_kinds_where_the_shared_expert_reads_another() -> None:
    ops = program(SPECS["qwen2_moe"], mix_of("int8,shared=bf16"))[1]
    (norm,) = (op.arguments for op in ops if op.kind == "norm" and op.layer == 0 and op.part == "moe")
    assert (norm["output"], norm["output8"]) == (Buffer("normed.96"), Buffer("normed8.96"))
    assert (norm["output_stride"], norm["output8_stride"]) == (128, 192)


def test_biases_sinks_and_the_activation_reach_their_ops() -> None:
    plain, ops = (program(SPECS[name], FormatMix.uniform("int4"))[1] for name in ("qwen3_moe", "with biases"))
    for op in (only(plain, kind, 0) for kind in ("router", "gate_up", "down")):
        assert op.arguments["bias"] is None
    assert only(plain, "attention", 0).arguments["sinks"] is None
    assert only(plain, "gate_up", 0).arguments["activation"] == Choice("Activation", "silu")
    assert only(ops, "attention", 1).arguments["sinks"] == Weight("layers.1.attention.sinks")
    assert only(ops, "router", 0).arguments["bias"] == Weight("layers.0.ffn.router_bias")
    assert only(ops, "gate_up", 2).arguments["bias"] == Weight("layers.2.ffn.gate_up_bias")
    assert only(ops, "gate_up", 2).arguments["activation"] == Choice("Activation", "swiglu_clamped")
    assert only(ops, "down", 1).arguments["bias"] == Weight("layers.1.ffn.down_bias")
