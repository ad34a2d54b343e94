"""The arguments of ops have names and types, and values that cannot be right are refused with op, field and value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kv_pages import KvPages, SharedPages
from rig import BF16, aligned

import cpu_kernels
from cpu_kernels import Activation, Executor, ExpertSet, Format, KvLayout, Part, Routing, Scoring, StateLayout
from hybrid.formats import FORMATS

BEST = cpu_kernels.available_isas()[0]
MEMORY = aligned(1 << 16, np.uint8)
PLACE = MEMORY.ctypes.data
ROUTING_FIELDS = {"offsets": PLACE, "rows": PLACE, "weights": PLACE, "active": PLACE, "count": PLACE}
ROUTING = Routing(**ROUTING_FIELDS)
KV = KvPages(1, 2, 64, 256).layout
SHARED = SharedPages(1, 50, 12, 256).layout
INDEXED = SharedPages(1, 50, 12, 256, index_dim=20).layout
ENTRIES_FIELDS: dict[str, Any] = {  # of 4 tokens an entry of 64 dimensions, and a key of an indexer of 32
    **{"base": PLACE, "sequence_stride": 53248, "head_stride": 0, "value_offset": 0, "key_dim": 64, "value_dim": 64},
    **{"format": Format.bf16, "key_scales_offset": 0, "value_scales_offset": 0, "shared": True},
    **{"tail_offset": 20480, "entry_offset": 32768, "entry_bytes": 128, "index_offset": 40960, "index_dim": 32},
}
ENTRIES = KvLayout(**ENTRIES_FIELDS)
STATE = StateLayout(base=PLACE, sequence_stride=1472)
STATE_OF_CHANNELS = StateLayout(base=PLACE, sequence_stride=cpu_kernels.delta_state_bytes(4, 20, 28, by_channel=True))
STATE_OF_MATRICES = StateLayout(base=PLACE, sequence_stride=cpu_kernels.delta_state_bytes(4, 20, 28))
SET = {
    **{"format": Format.bf16, "input": PLACE, "input_stride": 128, "routing": ROUTING, "experts": PLACE, "bias": 0},
    **{"expert_stride": 8192, "blocks": 2, "inputs": 64},
}
# Every op with arguments that are accepted; those that may be left out are.
OPS: dict[str, dict[str, Any]] = {
    "embed": {"table": PLACE, "output": PLACE, "hidden": 64, "pairs": 32, "output_stride": 64},
    "rope_table": {"inverse_frequencies": PLACE, "table": PLACE, "dim": 64, "factor": 1.0},
    "norm": {
        **{"input": PLACE, "weight": PLACE, "output": 0, "output_f32": 0, "output8": 0, "width": 64, "eps": 1e-6},
        **{"input_stride": 64, "output_stride": 64, "output8_stride": 0, "logit_rows": False},
    },
    "quantise": {
        **{"input": PLACE, "output": PLACE, "width": 64, "input_stride": 128, "output_stride": 128, "multiple": 1},
    },
    "gemm": {
        **{"format": Format.int4, "input": PLACE, "weight": PLACE, "bias": 0, "output": PLACE, "columns": 40},
        **{"inputs": 64, "input_stride": 128, "output_stride": 64, "accumulate": True},
    },
    "soft_cap": {"columns": 40, "cap": 30.0},
    "head_gemm": {
        **{"format": Format.bf16, "input": PLACE, "weight": PLACE, "output": PLACE, "heads": 3, "columns": 40},
        **{"inputs": 64, "input_stride": 384, "input_head_stride": 128, "weight_head_stride": 6144},
        **{"output_stride": 128, "output_head_stride": 42},
    },
    "latent": {
        **{"queries": PLACE, "latents": PLACE, "rope": PLACE, "norm": PLACE, "plain": PLACE, "q": PLACE, "kv": SHARED},
        **{"heads": 3, "nope_dim": 20, "rope_dim": 12, "rank": 50, "interleaved": True, "query_stride": 128},
        **{"latent_stride": 64, "plain_stride": 64, "eps": 1e-6},
    },
    "qkv": {
        **{"qkv": PLACE, "rope": PLACE, "q_norm": 0, "k_norm": 0, "q": PLACE, "kv": KV, "heads": 4, "kv_heads": 2},
        **{"head_dim": 64, "rope_dim": 32, "interleaved": False, "qkv_stride": 512, "eps": 1e-6},
    },
    "attention": {
        **{"q": PLACE, "output": PLACE, "states": PLACE, "sinks": 0, "kv": KV, "heads": 4, "kv_heads": 2},
        **{"head_dim": 64, "output_stride": 256, "window": 0, "scale": 0.125},
    },
    "index": {
        **{"queries": PLACE, "keys": PLACE, "rope": PLACE, "norm": PLACE, "norm_bias": PLACE, "q": PLACE},
        **{"kv": INDEXED, "heads": 3, "head_dim": 20, "rope_dim": 12, "interleaved": True, "query_stride": 64},
        **{"key_stride": 64, "eps": 1e-6},
    },
    "index_scores": {"q": PLACE, "weights": PLACE, "scores": PLACE, "kv": INDEXED, "heads": 3, "selects": 16},
    "select": {"scores": PLACE, "q": PLACE, "selected": PLACE, "selects": 16, "query_stride": 64},
    "turn": {
        **{
            "queries": PLACE,
            "keys": 0,
            "rope": PLACE,
            "norm": 0,
            "q": PLACE,
            "kv": ENTRIES,
            "heads": 3,
            "head_dim": 60,
            "made": 0,
        },
        **{"padded_dim": 64, "rope_dim": 12, "interleaved": True, "normed": True, "query_stride": 192},
        **{"key_stride": 64, "eps": 1e-6},
    },
    "unturn": {
        **{"values": PLACE, "rope": PLACE, "heads": 3, "head_dim": 60, "rope_dim": 12, "interleaved": True},
        **{"stride": 180},
    },
    "compress": {
        **{"made": PLACE, "bias": PLACE, "norm": PLACE, "rope": PLACE, "kv": ENTRIES, "indexes": False, "dim": 60},
        **{
            "rope_dim": 12,
            "rate": 4,
            "overlaps": True,
            "interleaved": True,
            "first_value": 0,
            "first_gate": 120,
            "tokens": 8,
        },
        **{"width": 256, "eps": 1e-6},
    },
    "keep": {"made": PLACE, "kv": ENTRIES, "tokens": 8, "width": 256},
    "entry_scores": {
        **{"q": PLACE, "weights": PLACE, "scores": PLACE, "kv": ENTRIES, "heads": 3, "rate": 4, "selects": 16},
    },
    "stream_gates": {
        **{"low": PLACE, "output": PLACE, "weights": PLACE, "count": 4, "rank": 20, "low_stride": 64},
        **{"output_stride": 64},
    },
    "ngrams": {"hash": PLACE, "ids": PLACE, "state": STATE, "size": 3, "heads": 2, "end": 5},
    "lookup": {"table": PLACE, "ids": PLACE, "output": PLACE, "dim": 12, "count": 4, "output_stride": 64},
    "ngram_gate": {
        **{"projected": PLACE, "streams": PLACE, "key_norm": PLACE, "query_norm": PLACE, "gates": PLACE, "count": 4},
        **{"width": 40, "projected_stride": 256, "stream_stride": 192, "eps": 1e-6},
    },
    "ngram_conv": {
        **{"values": PLACE, "gates": PLACE, "norm": PLACE, "weight": PLACE, "streams": PLACE, "state": STATE},
        **{"count": 2, "width": 32, "taps": 3, "dilation": 2, "value_stride": 64, "stream_stride": 64},
    },
    "see": {
        **{"scores": 0, "q": 0, "seen": PLACE, "counts": PLACE, "window": 20, "stride": 84, "query_stride": 192},
        **{"rate": 4, "selects": 0},
    },
    "select_pools": {
        **{"scores": PLACE, "q": PLACE, "selected": PLACE, "counts": PLACE, "rate": 4, "selects": 16, "stride": 67},
        **{"query_stride": 192},
    },
    "collapse": {
        **{"streams": PLACE, "products": PLACE, "base": PLACE, "scale": PLACE, "output": PLACE, "weights": PLACE},
        **{"cleared": PLACE, "count": 4, "width": 40, "stream_stride": 192, "output_stride": 64, "rounds": 20},
        **{"eps": 1e-6, "floor": 1e-6},
    },
    "expand": {
        **{"input": PLACE, "weights": PLACE, "streams": PLACE, "count": 4, "width": 40, "input_stride": 64},
        **{"stream_stride": 192},
    },
    "block_scores": {"q": PLACE, "scores": PLACE, "kv": INDEXED, "heads": 3, "selects": 16},
    "select_blocks": {
        **{"scores": PLACE, "q": PLACE, "selected": PLACE, "heads": 3, "selects": 16, "query_stride": 64},
    },
    "short_conv": {
        **{"input": PLACE, "weight": PLACE, "bias": 0, "output": PLACE, "state": STATE, "width": 40, "taps": 3},
        **{"input_stride": 128, "output_stride": 64},
    },
    "silu_conv": {"values": PLACE, "weight": PLACE, "state": STATE, "width": 40, "taps": 3, "stride": 64},
    "gated_delta": {
        **{"input": PLACE, "decays": PLACE, "decay_rate": PLACE, "decay_bias": PLACE, "norm": PLACE, "output": PLACE},
        **{"state": STATE_OF_MATRICES, "key_heads": 2, "value_heads": 4, "key_dim": 20, "value_dim": 28},
        **{"input_stride": 320, "decay_stride": 8, "output_stride": 128, "eps": 1e-6},
    },
    "state_space": {
        **{"values": PLACE, "steps": PLACE, "bias": PLACE, "rate": PLACE, "skip": PLACE, "state": STATE_OF_MATRICES},
        **{"heads": 4, "groups": 2, "head_dim": 28, "state_dim": 20, "stride": 320, "step_stride": 4},
        **{"smallest": 0.0, "largest": 1e9},
    },
    "group_norm": {
        **{"input": PLACE, "weight": PLACE, "output": PLACE, "width": 112, "groups": 2, "input_stride": 320},
        **{"output_stride": 128, "eps": 1e-6},
    },
    "kimi_delta": {
        **{"input": PLACE, "decays": PLACE, "betas": PLACE, "gates": PLACE, "decay_rate": PLACE, "decay_bias": PLACE},
        **{"norm": PLACE, "output": PLACE, "state": STATE_OF_CHANNELS, "heads": 4, "key_dim": 20, "value_dim": 28},
        **{"input_stride": 320, "decay_stride": 128, "beta_stride": 4, "gate_stride": 128, "output_stride": 128},
        "eps": 1e-6,
    },
    "gate": {
        **{"values": PLACE, "gates": PLACE, "heads": 4, "head_dim": 24, "stride": 128, "gate_stride": 192},
        **{"gate_head_stride": 48},
    },
    "router": {
        **{"input": PLACE, "weight": PLACE, "bias": 0, "logits": PLACE, "experts": 4, "hidden": 64},
        **{"input_stride": 64},
    },
    "topk": {
        **{"logits": PLACE, "ids": PLACE, "weights": PLACE, "experts": 4, "top_k": 2, "renormalise": True},
        **{"scoring": Scoring.softmax, "scale": 1.0},
    },
    "group": {"ids": PLACE, "weights": 0, "routing": ROUTING, "experts": 4, "top_k": 2},
    "gate_up": {**SET, "output": PLACE, "output_stride": 64, "activation": Activation.silu},
    "down": {**SET, "output": PLACE, "output_stride": 64},
    "join": {"partials": [PLACE, PLACE], "output": PLACE, "width": 64, "output_stride": 64},
    "combine": {
        **{"ids": PLACE, "weights": PLACE, "contributions": PLACE, "output": PLACE, "top_k": 2, "width": 64},
        **{"stride": 64, "output_stride": 64},
    },
}
EVERY_FIELD = [(op, field) for op, fields in OPS.items() for field in fields]


def executor(**limits: Any) -> Executor:
    sizes = {"rows": 4, "sequences": 2, "positions": 256, "vocab": 40, "scratch_bytes": 1 << 20}
    return Executor(isa=BEST, pool=cpu_kernels.ThreadPool(1, []), **sizes | limits)


def add(op: str, **changes: Any) -> Executor:
    to = executor()
    getattr(to, op)(part=Part.other, **OPS[op] | changes)
    return to


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_added_and_tells_its_fields(op) -> None:
    assert add(op).op_count == (2 if op == "attention" else 1)
    text = getattr(Executor, op).__doc__
    assert "part: Part" in text and all(f"\n    {field}: " in text for field in OPS[op])


def test_no_op_is_missing_here() -> None:
    with pytest.raises(ValueError, match="op 'other' is unknown; known: ") as error:
        cpu_kernels.scratch_bytes("other", BEST, 1)
    assert set(str(error.value).split("known: ")[1].split(", ")) == set(OPS)


@pytest.mark.parametrize(("op", "field"), EVERY_FIELD)
def test_a_field_that_is_left_out_is_named(op, field) -> None:
    arguments = {name: value for name, value in OPS[op].items() if name != field}
    with pytest.raises(TypeError, match=rf"^{op} lacks {field}$"):
        getattr(executor(), op)(part=Part.other, **arguments)


@pytest.mark.parametrize("op", OPS)
def test_arguments_that_no_op_has_are_named(op) -> None:
    with pytest.raises(TypeError, match=rf"^{op} has no colour; it has part, node, "):
        add(op, colour=1)
    with pytest.raises(TypeError, match=rf"^{op} lacks part$"):
        getattr(executor(), op)(**OPS[op])
    with pytest.raises(TypeError):
        getattr(executor(), op)(Part.other, **OPS[op])


@pytest.mark.parametrize(("op", "field"), EVERY_FIELD)
def test_a_value_of_another_type_is_named(op, field) -> None:
    for wrong in ("text", MEMORY, None):
        with pytest.raises(TypeError, match=rf"^{op}: {field} must be .*, not "):
            add(op, **{field: wrong})
    if isinstance(OPS[op][field], int) and not isinstance(OPS[op][field], bool):
        for wrong in (1.5, True):
            with pytest.raises(TypeError, match=rf"^{op}: {field} must be .*, not {type(wrong).__name__} {wrong}"):
                add(op, **{field: wrong})


def _is_number(op: str, field: str) -> bool:
    return isinstance(OPS[op][field], int) and not isinstance(OPS[op][field], bool)


@pytest.mark.parametrize(("op", "field"), [place for place in EVERY_FIELD if _is_number(*place)])
def test_negative_and_too_large_numbers_are_named(op, field) -> None:
    for wrong in (-1, -(1 << 40), 1 << 64):
        with pytest.raises(ValueError, match=rf"^{op}: {field} is {wrong}[;,]"):
            add(op, **{field: wrong})


NULLABLE = {
    *(("norm", name) for name in ("output", "output_f32", "output8")),
    *(("gemm", name) for name in ("bias", "output")),
    *(("qkv", name) for name in ("q_norm", "k_norm")),
    *(
        ("attention", "sinks"),
        ("short_conv", "bias"),
        ("router", "bias"),
        ("index", "norm_bias"),
        ("group", "ids"),
        ("group", "weights"),
    ),
    *(("gate_up", "bias"), ("down", "bias"), ("latent", "rope"), ("compress", "norm")),
    *(("collapse", "weights"), ("collapse", "cleared"), ("expand", "weights")),
    *(("compress", "bias"), ("entry_scores", "weights"), ("stream_gates", "weights")),
}
ADDRESSES = [(op, field) for op, field in EVERY_FIELD if OPS[op][field] == PLACE or (op, field) in NULLABLE]


@pytest.mark.parametrize(("op", "field"), ADDRESSES)
def test_null_is_refused_where_something_must_be(op, field) -> None:
    if (op, field) in NULLABLE:
        changes = {"output_stride": 40} if (op, field) == ("gemm", "output") else {}  # the logits are written
        assert add(op, **{field: 0}, **changes).op_count
        return
    with pytest.raises(ValueError, match=rf"^{op}: .*{field}.* null"):
        add(op, **{field: 0})


@pytest.mark.parametrize(
    ("op", "field", "offset", "multiple"),
    [
        ("norm", "input", 2, 4),
        ("quantise", "input", 1, 2),
        ("group", "ids", 2, 4),
        ("gemm", "bias", 2, 4),
        ("gemm", "weight", 32, 64),
        ("down", "experts", 32, 64),
    ],
)
def test_an_address_fits_what_it_points_to(op, field, offset, multiple) -> None:
    address = PLACE + offset
    message = rf"^{op}: {field} is the address {address}; it must be a multiple of {multiple}$"
    with pytest.raises(ValueError, match=message):
        add(op, **{field: address})
    add(op, **{field: PLACE + multiple})


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("rope_table", {"long_frequencies": PLACE}, "lengths is null, and there are long_frequencies"),
        ("rope_table", {"dim": 63}, "dim is 63; it must be even"),
        ("short_conv", {"taps": 9}, "taps 9 is above 8"),
        ("collapse", {"count": 9}, "count 9 is above 8"),
        ("collapse", {"products": 0, "base": 0, "scale": 0}, "products is null, and weights are not"),
        ("collapse", {"stream_stride": 159}, "stream_stride is 159; what it steps over has 160"),
        ("collapse", {"norm": PLACE}, "of norm and gates one is null, and the other is not"),
        ("collapse", {"norm": PLACE, "gates": PLACE}, "gate_stride is 0; what it steps over has 160"),
        ("expand", {"count": 9}, "count 9 is above 8"),
        ("expand", {"input_stride": 39}, "input_stride is 39; what it steps over has 40"),
        ("turn", {"rope_dim": 13}, "rope_dim is 13; it must be even and at most the 60 of a head"),
        ("turn", {"padded_dim": 59}, "padded_dim is 59; what it steps over has 60"),
        ("turn", {"query_stride": 179}, "query_stride is 179; what it steps over has 180"),
        ("turn", {"query_norm": PLACE}, "query_norm is not null, and queries are normed without a weight"),
        ("turn", {"keys": PLACE}, "keys, norm and made are all there or none is"),
        ("turn", {"keys": PLACE, "norm": PLACE, "key_stride": 59}, "key_stride is 59; what it steps over has 60"),
        ("unturn", {"stride": 179}, "stride is 179; what it steps over has 180"),
        ("compress", {"dim": 65}, "padded_dim is 64; what it steps over has 65"),
        ("compress", {"rate": 129}, "an entry of 258 tokens; at most 256 are supported"),
        ("compress", {"tokens": 7}, "tokens is 7; an entry is made of 8"),
        ("compress", {"first_gate": 137}, "width is 256; what it steps over has 257"),
        ("compress", {"indexes": True}, "padded_dim is 32; what it steps over has 60"),
        ("keep", {"tokens": 33}, "kv.sequence_stride is 53248; what it steps over has 54272"),
        ("entry_scores", {"kv": SHARED}, "kv.index_dim is 0; it must be from 1 to 1024"),
        ("entry_scores", {"heads": 257}, "heads 257 is above 256"),
        ("select_pools", {"rate": 1}, "rate is 1; a pool is of several tokens"),
        ("select_pools", {"stride": 66}, "stride is 66; what it steps over has 67"),
        ("see", {"window": 129}, "window 129 is above 128"),
        ("see", {"rate": 1}, "rate is 1; an entry stands for several tokens"),
        ("stream_gates", {"count": 9}, "count 9 is above 8"),
        ("stream_gates", {"rank": 61}, "low_stride is 64; what it steps over has 65"),
        ("stream_gates", {"output_stride": 19}, "output_stride is 19; what it steps over has 20"),
        ("ngrams", {"size": 1}, "size is 1; it must be at least 2"),
        ("ngrams", {"size": 9}, "size 9 is above 8"),
        ("lookup", {"output_stride": 47}, "output_stride is 47; what it steps over has 48"),
        ("ngram_gate", {"projected_stride": 199}, "projected_stride is 199; what it steps over has 200"),
        ("ngram_gate", {"stream_stride": 159}, "stream_stride is 159; what it steps over has 160"),
        ("ngram_conv", {"taps": 9}, "taps 9 is above 8"),
        ("ngram_conv", {"count": 3}, "a width of 32 is not 3 of one size"),
        ("ngram_conv", {"value_stride": 15}, "value_stride is 15; what it steps over has 16"),
        ("ngram_conv", {"stream_stride": 31}, "stream_stride is 31; what it steps over has 32"),
        ("ngram_conv", {"dilation": 3}, r"state\.sequence_stride is 1472; what it steps over has 1664"),
        ("see", {"stride": 19}, "stride is 19; what it steps over has 20"),
        ("see", {"stride": 83}, "stride is 83; what it steps over has 84"),
        ("see", {"selects": 7}, "scores, q and selects are all there or none is"),
        ("attention", {"counts": PLACE}, "selected is null, and counts are not"),
        ("attention", {"score_cap": -1.0}, "score_cap is below 0; it must be above, or 0 for no bounds"),
        (
            "attention",
            {"selected": PLACE, "selects": 1, "counts": PLACE, "fresh": PLACE, "kept": 1, "score_cap": 1.0},
            "score_cap is not 0 beside fresh",
        ),
        ("attention", {"head_dim": 65}, "the width of a value 65 is above kv.value_dim 64"),
        ("qkv", {"value_head_dim": 65}, "the width of a value 65 is above kv.value_dim 64"),
        ("qkv", {"value_head_dim": 32, "qkv_stride": 447}, "qkv_stride is 447; what it steps over has 448"),
        (
            "qkv",
            {"value_head_dim": 32, "keys_are_values": True},
            "value_head_dim is 32; keys are values, of head_dim 64",
        ),
        ("silu_conv", {"taps": 9}, "taps 9 is above 8"),
        ("gated_delta", {"key_heads": 3}, "4 value heads cannot share 3 key heads evenly"),
        ("gated_delta", {"key_dim": 257}, "key_dim 257 is above 256"),
        ("gated_delta", {"value_dim": 257}, "value_dim 257 is above 256"),
        ("state_space", {"groups": 3}, "4 heads cannot share 3 groups evenly"),
        ("state_space", {"head_dim": 257}, "head_dim 257 is above 256"),
        ("state_space", {"state_dim": 257}, "state_dim 257 is above 256"),
        ("group_norm", {"groups": 3}, "a width of 112 is not 3 groups of one size"),
        ("kimi_delta", {"key_dim": 257}, "key_dim 257 is above 256"),
        ("kimi_delta", {"value_dim": 257}, "value_dim 257 is above 256"),
        ("kimi_delta", {"lower_bound": 0.5}, r"lower_bound is 0\.50*; it must be at most 0"),
        ("qkv", {"norm_apart": True, "norm_last": True}, "norm_apart excludes norm_whole and norm_last"),
        ("qkv", {"gated": True, "norm_whole": True, "qkv_stride": 768}, "gated and norm_whole exclude each other"),
        ("rope_table", {"factor": float("nan")}, "factor is -?nan"),
        ("norm", {"eps": float("inf")}, "eps is inf"),
        ("quantise", {"width": 65}, "width is 65; it must be a multiple of 64"),
        ("gemm", {"inputs": 96}, "inputs is 96; it must be a multiple of 64"),
        ("gemm", {"output": 0}, "output_stride is 64; logits have rows of 40"),
        (
            "gemm",
            {"output": 0, "output_stride": 40, "first_column": 1},
            "40 columns from column 1 on are more than the 40",
        ),
        ("soft_cap", {"columns": 41}, "columns is 41; logits have rows of 40"),
        ("soft_cap", {"cap": 0.0}, "cap is 0.0+; it must be above 0"),
        ("norm", {"factor": PLACE}, "output_f32 is null, and there is a factor"),
        ("qkv", {"qkv_stride": 383, "keys_are_values": True}, "qkv_stride is 383; what it steps over has 384"),
        ("qkv", {"head_dim": 65}, "head_dim 65 is above kv.key_dim 64"),
        ("qkv", {"head_dim": 1025}, "head_dim 1025 is above 1024"),
        ("qkv", {"rope_dim": 31}, "rope_dim is 31; it must be even and at most head_dim 64"),
        ("qkv", {"rope_dim": 66}, "rope_dim is 66; it must be even and at most head_dim 64"),
        ("qkv", {"rope": 0}, "rope is null, and rope_dim is 32"),
        ("qkv", {"q": 0}, "q is null, and there are 4 heads"),
        ("qkv", {"kv_heads": 0}, "kv_heads is 0; it must be at least 1"),
        ("head_gemm", {"output_head_stride": 39}, "output_head_stride is 39; what it steps over has 40"),
        ("head_gemm", {"output_stride": 123}, "output_stride is 123; what it steps over has 124"),
        ("head_gemm", {"input_head_stride": 126}, "input_stride is 126; what it steps over has 128"),
        ("head_gemm", {"weight_head_stride": 6080}, "weight_head_stride is 6080; what it steps over has 6144"),
        ("latent", {"kv": KV}, "kv.shared is false"),
        ("latent", {"rank": 53}, "rank 53 and the 12 dimensions behind it are above kv.key_dim 64"),
        ("latent", {"rank": 63, "rope_dim": 0}, "rank 63 and the 2 dimensions behind it are above kv.key_dim 64"),
        ("latent", {"rope_dim": 11}, "rope_dim is 11; it must be even"),
        ("latent", {"norm": 0}, "norm is null, and rope is not"),
        ("latent", {"rope": 0, "norm": 0}, "queries, plain, q or norm is null, and there are 3 heads"),
        ("latent", {"plain": 0}, "queries, plain, q or norm is null, and there are 3 heads"),
        ("latent", {"query_stride": 95}, "query_stride is 95; what it steps over has 96"),
        ("attention", {"output_head_stride": 63}, "output_head_stride is 63; what it steps over has 64"),
        ("attention", {"output_head_stride": 80}, "output_stride is 256; what it steps over has 304"),
        ("attention", {"heads": 5}, "5 heads cannot share 2 KV heads evenly"),
        ("attention", {"heads": 514}, "257 query heads per KV head; at most 256 are supported"),
        ("attention", {"output": 0}, "output and partials are null"),
        ("attention", {"selected": PLACE}, "selected is not null, and selects is 0"),
        (
            "attention",
            {"kv": SHARED, "kv_heads": 1, "head_dim": 48, "selects": 9},
            "selected is null, and selects is 9",
        ),
        (
            "attention",
            {"selected": PLACE, "selects": 9, "window": 9},
            "keys are selected without a window, ends or blocks",
        ),
        ("index", {"kv": SHARED}, "head_dim 20 is above kv.index_dim 0"),
        ("index", {"head_dim": 33}, "head_dim 33 is above kv.index_dim 32"),
        ("index", {"head_dim": 19}, "head_dim is 19; it must be even"),
        ("index", {"rope_dim": 22}, "rope_dim is 22; it must be even and at most head_dim 20"),
        ("index", {"query_stride": 59}, "query_stride is 59; what it steps over has 60"),
        ("index", {"key_stride": 19}, "key_stride is 19; what it steps over has 20"),
        ("attention", {"blocks": PLACE}, "blocks is not null, and block_count is 0"),
        ("attention", {"block_count": 9}, "blocks is null, and block_count is 9"),
        (
            "attention",
            {"blocks": PLACE, "block_count": 9, "window": 5},
            "blocks are selected of keys that are not shared, without a window or ends",
        ),
        ("block_scores", {"kv": SHARED}, "head_dim 1 is above kv.index_dim 0"),
        ("block_scores", {"heads": 257}, "heads 257 is above 256"),
        ("index_scores", {"kv": SHARED}, "head_dim 1 is above kv.index_dim 0"),
        ("index_scores", {"heads": 257}, "heads 257 is above 256"),
        ("topk", {"top_k": 5}, "top_k 5 is above experts 4"),
        ("gate_up", {"bound": -1.0}, r"bound is -1\.0+; it must be 0, or above it with silu"),
        ("gate_up", {"shared_bound": 2.0, "activation": Activation.gelu_tanh}, r"shared_bound is 2\.0+; it must be 0"),
        ("gate_up", {"shared": ExpertSet(**SET)}, "shared_output is null, and there is a shared expert"),
        ("gate_up", {"shared": ExpertSet(**SET | {"experts": 0})}, "shared.experts is null"),
        ("down", {"shared": ExpertSet(**SET | {"input": 0})}, "shared.input is null"),
        ("group", {"routing": Routing(**ROUTING_FIELDS | {"active": 0})}, "routing.active is null"),
        ("join", {"partials": []}, "partials has 0 addresses; from 1 to 16 are allowed"),
        ("join", {"partials": [PLACE, 0]}, r"partials\[1\] is null"),
        ("join", {"partials": [PLACE, PLACE + 1]}, r"partials\[1\] is the address"),
        ("attention", {"node": 0}, "attention is shared by all nodes"),
    ],
)
def test_values_that_do_not_fit_are_refused(op, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        add(op, **changes)


def test_parts_of_ops_are_read_as_ops_are() -> None:
    with pytest.raises(TypeError, match=r"^Routing lacks rows, count$"):
        Routing(offsets=0, weights=0, active=0)
    with pytest.raises(TypeError, match=r"^Routing has no colour; it has offsets, rows, weights, active, count$"):
        Routing(**ROUTING_FIELDS, colour=1)
    with pytest.raises(TypeError, match=r"^ExpertSet: routing must be Routing, not int 0$"):
        ExpertSet(**SET | {"routing": 0})
    with pytest.raises(ValueError, match=r"^ExpertSet: blocks is 0; it must be at least 1$"):
        ExpertSet(**SET | {"blocks": 0})
    with pytest.raises(ValueError, match=r"^Routing: rows is the address 2; it must be a multiple of 4$"):
        Routing(**ROUTING_FIELDS | {"rows": 2})


def layout(**changes: Any) -> KvLayout:
    strides = {"sequence_stride": 1 << 20, "head_stride": 1 << 16, "value_offset": 1 << 15}
    sizes = {"key_dim": 64, "value_dim": 64, "format": Format.int8}
    sizes |= {"key_scales_offset": 49152, "value_scales_offset": 50176}
    return KvLayout(**{"base": PLACE} | strides | sizes | changes)


def test_layouts_of_keys_and_values_are_checked() -> None:
    add("attention", kv=layout())
    for changes, message in (
        ({"key_dim": 48}, "KvLayout: key_dim is 48; it must be a multiple of 32"),
        ({"value_dim": 0}, "KvLayout: value_dim is 0; it must be at least 16"),
        ({"head_stride": 100}, "KvLayout: head_stride is 100; it must be a multiple of 64"),
        ({"sequence_stride": -64}, "KvLayout: sequence_stride is -64; it must be at least 0"),
        ({"base": PLACE + 4}, "KvLayout: base is the address"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            layout(**changes)
    with pytest.raises(ValueError, match="keys and values are stored as bf16, int8 or fp8"):
        add("attention", kv=layout(format=Format.int4))
    with pytest.raises(ValueError, match=r"attention: kv\.base is null"):
        add("attention", kv=layout(base=0))


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("embed", {"pairs": 31}, "pairs is 31; what it steps over has 32"),
        ("norm", {"input_stride": 63}, "input_stride is 63; what it steps over has 64"),
        ("norm", {"output": PLACE, "output_stride": 60}, "output_stride is 60"),
        ("norm", {"output8": PLACE, "output8_stride": 72}, "output8_stride is 72; what it steps over has 76"),
        ("norm", {"output8": PLACE, "output8_stride": 78}, "output8_stride is 78; it must be a multiple of 4"),
        ("norm", {"output8": PLACE + 1, "output8_stride": 80}, "output8 is .*; it must be a multiple of 4"),
        (
            "norm",
            {"output_grouped": PLACE, "output_grouped_stride": 92},
            "output_grouped_stride is 92; what it steps over has 96",
        ),
        (
            "norm",
            {"output_grouped": PLACE, "output_grouped_stride": 98},
            "output_grouped_stride is 98; it must be a multiple of 4",
        ),
        (
            "norm",
            {"output_grouped": PLACE + 1, "output_grouped_stride": 96},
            "output_grouped is .*; it must be a multiple of 4",
        ),
        ("quantise", {"grouped": True, "output_stride": 92}, "output_stride is 92; what it steps over has 96"),
        (
            "norm",
            {"output_wide": PLACE, "output_wide_stride": 272},
            "output_wide_stride is 272; what it steps over has 276",
        ),
        (
            "norm",
            {"output_wide": PLACE + 1, "output_wide_stride": 276},
            "output_wide is .*; it must be a multiple of 4",
        ),
        ("quantise", {"wide": True, "output_stride": 272}, "output_stride is 272; what it steps over has 276"),
        ("quantise", {"wide": True, "grouped": True}, "rows are grouped or wide, not both"),
        ("gemm", {"format": Format.nvfp4, "input_stride": 272}, "input_stride is 272; what it steps over has 276"),
        ("gemm", {"format": Format.mxfp4, "input_stride": 278}, "input_stride is 278; it must be a multiple of 4"),
        ("gemm", {"format": Format.q4_1, "input_stride": 92}, "input_stride is 92; what it steps over has 96"),
        ("quantise", {"input_stride": 126}, "input_stride is 126; what it steps over has 128"),
        ("quantise", {"output_stride": 64}, "output_stride is 64; what it steps over has 76"),
        ("gemm", {"input_stride": 72}, "input_stride is 72; what it steps over has 76"),
        ("gemm", {"format": Format.bf16, "input_stride": 127}, "input_stride is 127; what it steps over has 128"),
        ("gemm", {"columns": 65}, "output_stride is 64; what it steps over has 65"),
        ("gemm", {"columns": (1 << 28) + 1}, "columns is 268435457; it must be at most 268435456"),
        ("qkv", {"growth": 0.1}, "growth_length is 0; queries that grow need one above 0"),
        ("latent", {"growth": 0.1}, "growth_length is 0; queries that grow need one above 0"),
        ("qkv", {"qkv_stride": 511}, "qkv_stride is 511; what it steps over has 512"),
        ("attention", {"output_stride": 255}, "output_stride is 255; what it steps over has 256"),
        ("attention", {"kv": layout(value_offset=8192)}, r"kv\.value_offset is 8192; what it steps over has 16384"),
        ("qkv", {"kv": layout(key_scales_offset=32768)}, r"kv\.key_scales_offset is 32768; .* has 49152"),
        ("qkv", {"kv": layout(value_scales_offset=49152)}, r"kv\.value_scales_offset is 49152; .* has 50176"),
        ("qkv", {"kv": layout(head_stride=51136)}, r"kv\.head_stride is 51136; what it steps over has 51200"),
        ("qkv", {"kv": layout(sequence_stride=65536)}, r"kv\.sequence_stride is 32768; .* has 65536"),
        ("short_conv", {"input_stride": 119}, "input_stride is 119; what it steps over has 120"),
        ("short_conv", {"taps": 4}, r"state\.sequence_stride is 1472; what it steps over has 1600"),
        ("silu_conv", {"stride": 39}, "stride is 39; what it steps over has 40"),
        ("silu_conv", {"taps": 4}, r"state\.sequence_stride is 1472; what it steps over has 1600"),
        ("gated_delta", {"input_stride": 303}, "input_stride is 303; what it steps over has 304"),
        ("gated_delta", {"decay_stride": 7}, "decay_stride is 7; what it steps over has 8"),
        ("gated_delta", {"output_stride": 111}, "output_stride is 111; what it steps over has 112"),
        ("gated_delta", {"state": STATE}, r"state\.sequence_stride is 1472; what it steps over has"),
        ("state_space", {"stride": 303}, "stride is 303; what it steps over has 304"),
        ("state_space", {"step_stride": 3}, "step_stride is 3; what it steps over has 4"),
        ("state_space", {"state": STATE}, r"state\.sequence_stride is 1472; what it steps over has"),
        ("group_norm", {"input_stride": 111}, "input_stride is 111; what it steps over has 112"),
        ("group_norm", {"output_stride": 111}, "output_stride is 111; what it steps over has 112"),
        ("kimi_delta", {"input_stride": 271}, "input_stride is 271; what it steps over has 272"),
        ("kimi_delta", {"decay_stride": 79}, "decay_stride is 79; what it steps over has 80"),
        ("kimi_delta", {"beta_stride": 3}, "beta_stride is 3; what it steps over has 4"),
        ("kimi_delta", {"gate_stride": 111}, "gate_stride is 111; what it steps over has 112"),
        ("kimi_delta", {"output_stride": 111}, "output_stride is 111; what it steps over has 112"),
        ("kimi_delta", {"state": STATE_OF_MATRICES}, r"state\.sequence_stride is \d+; what it steps over has"),
        ("gate", {"gate_head_stride": 1}, "gate_head_stride is 1; what it steps over has 24"),
        ("gate", {"stride": 95}, "stride is 95; what it steps over has 96"),
        ("gate", {"gate_head_stride": 23}, "gate_head_stride is 23; what it steps over has 24"),
        ("gate", {"gate_stride": 167}, "gate_stride is 167; what it steps over has 168"),
        ("gate", {"per_head": True, "gate_head_stride": 0}, "gate_head_stride is 0; what it steps over has 1"),
        ("gate", {"per_head": True, "gate_stride": 144}, "gate_stride is 144; what it steps over has 145"),
        ("qkv", {"gated": True, "qkv_stride": 767}, "qkv_stride is 767; what it steps over has 768"),
        ("router", {"input_stride": 63}, "input_stride is 63; what it steps over has 64"),
        ("gate_up", {"expert_stride": 8128}, "expert_stride is 8128; what it steps over has 8192"),
        ("gate_up", {"output_stride": 31}, "output_stride is 31; what it steps over has 32"),
        ("down", {"expert_stride": 4032}, "expert_stride is 4032; what it steps over has 4096"),
        ("down", {"output_stride": 31}, "output_stride is 31; what it steps over has 32"),
        ("down", {"shared": ExpertSet(**SET | {"blocks": 3, "expert_stride": 6144})}, "shared.blocks is 3; both sets"),
        ("join", {"output_stride": 63}, "output_stride is 63; what it steps over has 64"),
        ("combine", {"stride": 63}, "stride is 63; what it steps over has 64"),
        ("combine", {"width": 65}, "stride is 64; what it steps over has 80"),
    ],
)
def test_strides_hold_what_they_step_over(op, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        add(op, **changes)


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("quantise", {"multiple": 1 << 28}),
        ("group", {"top_k": 1 << 28}),
        ("qkv", {"heads": 1 << 21, "qkv_stride": 1 << 28}),
    ],
)
def test_steps_whose_tasks_cannot_be_counted_are_refused(op, changes) -> None:
    to = executor(rows=1024)
    with pytest.raises(ValueError, match=f"{op}: [0-9]+ tasks in a step are more than can be counted"):
        getattr(to, op)(part=Part.other, **OPS[op] | changes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stride_of_experts_is_that_of_their_packed_bytes(name) -> None:
    for inputs in (64, 128, 320, 1088):
        size = 2 * 2 * FORMATS[name].block_bytes(inputs)
        given = {"format": getattr(Format, name), "inputs": inputs, "input_stride": 8192, "expert_stride": size}
        add("gate_up", **given)
        with pytest.raises(ValueError, match=f"what it steps over has {size}"):
            add("gate_up", **given | {"expert_stride": size - 64})


def test_numbers_of_numpy_are_numbers() -> None:
    add("norm", width=np.int32(64), output8_stride=np.int64(0), eps=np.float32(1e-6), input=np.uint64(PLACE))


@pytest.mark.parametrize("limit", ["rows", "sequences", "positions", "vocab"])
def test_an_executor_for_nothing_is_refused(limit) -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"{limit} is {wrong}; it must be at least 1"):
            executor(**{limit: wrong})


def test_more_rows_of_logits_than_planned_for_write_nothing() -> None:
    """The norm gathers as many rows as logits are asked for."""
    x, normed = aligned((4, 64), np.float32, 1), aligned((8, 64), BF16, 7)
    to = executor()
    arguments = OPS["norm"] | {"input": x.ctypes.data, "weight": x.ctypes.data, "output": normed.ctypes.data}
    to.norm(part=Part.other, **arguments | {"logit_rows": True})
    one, rows = np.zeros(1, np.int32), np.zeros(5, np.int32)
    with pytest.raises(ValueError, match="logits of 5 rows; planned for at most 4"):
        to.step(one, one, one, rows, np.zeros((5, 40), np.float32))
    assert (normed == 7).all()
    to.step(one, one, one, rows[:4], np.zeros((4, 40), np.float32))
    assert (normed[:4] == 1).all() and (normed[4:] == 7).all()
