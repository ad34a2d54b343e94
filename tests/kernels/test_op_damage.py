"""NaN and infinity go through every op to the end of their row, and stay in it: nothing makes a number of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from expert_rig import Experts
from expert_rig import run as run_experts
from kv_pages import KvPages
from rig import BF16, Rig, aligned, empty_rows, format_of, packed, placed, quantise_kind, row_stride, rows_of

import cpu_kernels
from hybrid.config import KV_FORMATS
from hybrid.formats import FORMATS
from hybrid.models.layers.grouped_query_shape import STATE_EXTRA

ROWS, DAMAGED = 9, 4  # rows of a step, and the one that gets the damage
# Among the NaN those whose bits, rounded as those of a number, would become zero.
KINDS = {
    "nan": 0x7FC00000,
    "ones": 0xFFFFFFFF,
    "-ones": 0x7FFFFFFF,
    "inf": 0x7F800000,
    "-inf": 0xFF800000,
}
FLOATS = {name: np.array(bits, np.uint32).view(np.float32) for name, bits in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def check(
    compute: Callable[[np.ndarray], Any], x: np.ndarray, kind: str, columns: tuple[int, ...] = (0, 5, -1)
) -> None:
    """`compute` of rows x gives arrays of rows: with damage in any of some columns of one row none of that row is
    finite, and all others have the bits that they have without it. Columns count in what `x` has.
    """
    clean = _arrays(compute(placed(x)))
    assert all(np.isfinite(array.astype(np.float32)).all() for array in clean)
    for column in columns:
        planted = placed(x)
        planted[DAMAGED, column] = FLOATS[kind].astype(x.dtype)
        for array, expected in zip(_arrays(compute(planted)), clean, strict=True):
            assert not np.isfinite(array[DAMAGED].astype(np.float32)).any(), column
            others = np.arange(ROWS) != DAMAGED
            assert array[others].tobytes() == expected[others].tobytes(), column


def _arrays(made: Any) -> list[np.ndarray]:
    return [array.copy() for array in (made if isinstance(made, tuple) else (made,))]


def random_rows(width: int) -> np.ndarray:
    return np.random.default_rng(width).standard_normal((ROWS, width)).astype(np.float32)


def scales_of(rows: np.ndarray, width: int) -> np.ndarray:
    """The float32 scales of int8 activation rows."""
    first = row_stride(width) + row_stride(width) // 32 * 4
    return np.ascontiguousarray(rows[:, first : first + -(-row_stride(width) // 256) * 4]).view(np.float32)


def gemm(isa: str, format: str, rows: np.ndarray, width: int, columns: int = 20) -> np.ndarray:
    weight, _ = packed(format, np.random.default_rng(1).standard_normal((columns, width)).astype(BF16))
    output = aligned((len(rows), row_stride(columns)), np.float32)
    rig = Rig(isa)
    rig.add(
        "gemm", format=format_of(format), input=rows, weight=weight, bias=None, output=output, columns=columns,
        inputs=row_stride(width), input_stride=rows.strides[0], output_stride=output.shape[1], accumulate=False,
    )  # fmt: skip
    rig.run(len(rows))
    return output[:, :columns]


@pytest.mark.parametrize("width", [50, 300])
def test_norm(isa, kind, width) -> None:
    def norm(x: np.ndarray) -> tuple[np.ndarray, ...]:
        stride = row_stride(width)
        out16 = aligned((ROWS, stride), BF16)
        out8, grouped = empty_rows("int8", ROWS, width), empty_rows("q4_1", ROWS, width)
        wide = empty_rows("mxfp4", ROWS, width)
        rig = Rig(isa)
        rig.add(
            "norm", input=x, weight=np.ones(width, np.float32), output=out16, output_f32=None, output8=out8,
            width=width, input_stride=width, output_stride=stride, output8_stride=out8.strides[0], eps=1e-6,
            logit_rows=False, output_grouped=grouped, output_grouped_stride=grouped.strides[0],
            output_wide=wide, output_wide_stride=wide.strides[0],
        )  # fmt: skip
        rig.run(ROWS)
        read = {
            "bf16": out16,
            "int8": out8,
            "int4": out8,
            "q4_1": grouped,
            "q8_0": grouped,
            "q6_k": grouped,
            "mxfp4": wide,
        }
        return tuple(gemm(isa, format, rows, width) for format, rows in read.items())

    check(norm, random_rows(width), kind)


def test_norm_of_squares_that_overflow(isa) -> None:
    x, output = aligned((2, 64), np.float32, 1), aligned((2, 64), np.float32)
    x[0, 3] = 1e20
    rig = Rig(isa)
    rig.add(
        "norm", input=x, weight=np.ones(64, np.float32), output=None, output_f32=output, output8=None, width=64,
        input_stride=64, output_stride=64, output8_stride=0, eps=1e-6, logit_rows=False,
    )  # fmt: skip
    rig.run(2)
    assert np.isnan(output[0]).all() and np.isfinite(output[1]).all()


@pytest.mark.parametrize("rows", [ROWS, 40])
def test_products(isa, format, kind, rows) -> None:
    """Few rows stream past lines, many pass over panels."""
    width = 600
    more = np.repeat(random_rows(width)[:1], rows - ROWS, axis=0)

    def product(x: np.ndarray) -> np.ndarray:
        return gemm(isa, format, left(x), width)[:ROWS]

    def left(x: np.ndarray) -> np.ndarray:
        if FORMATS[format].rows == "bf16":
            return rows_of(format, np.concatenate([x, more]))
        source = aligned((rows, row_stride(width)), BF16)
        source[:, :width] = np.concatenate([x, more])
        made = empty_rows(format, rows, width)
        rig = Rig(isa)
        rig.add(
            "quantise", input=source, output=made, width=row_stride(width), input_stride=source.strides[0],
            output_stride=made.strides[0], multiple=1, **quantise_kind(FORMATS[format].rows),
        )  # fmt: skip
        rig.run(rows)
        return made

    check(product, random_rows(width).astype(BF16), kind, (0, 255, 300, -1))


def test_scales_of_weights(isa, kind) -> None:
    """A column of which a scale is damaged is damaged, in every row."""
    for format, dtype in (("int8", np.float32), ("int4", BF16), ("fp8", np.float32)):
        x = rows_of(format, random_rows(128))
        weight, _ = packed(format, np.random.default_rng(1).standard_normal((16, 128)).astype(BF16))
        weight.reshape(-1)[:64].view(dtype)[0] = FLOATS[kind].astype(dtype)
        output = aligned((ROWS, 64), np.float32)
        rig = Rig(isa)
        rig.add(
            "gemm", format=format_of(format), input=x, weight=weight, bias=None, output=output, columns=16,
            inputs=128, input_stride=x.strides[0], output_stride=64, accumulate=False,
        )  # fmt: skip
        rig.run(ROWS)
        assert not np.isfinite(output[:, 0]).any()


ROUTERS = {
    "softmax": {"scoring": cpu_kernels.Scoring.softmax},
    "topk_softmax": {"scoring": cpu_kernels.Scoring.topk_softmax},
    "sigmoid": {"scoring": cpu_kernels.Scoring.sigmoid},
    "groups": {"scoring": cpu_kernels.Scoring.sigmoid, "groups": 4, "top_groups": 2, "correction": np.zeros(40, "f4")},
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("gate", [False, True])
def test_router(isa, kind, router, gate) -> None:
    top_k, experts, found = 3, 40, []

    def topk(logits: np.ndarray) -> np.ndarray:
        found.append(choose(isa, logits, top_k, aligned(ROWS, np.float32) if gate else None, **ROUTERS[router]))
        return found[-1][1]

    check(topk, random_rows(experts + gate), kind, (0, 2, experts - 1))
    for ids, _ in found:
        assert all(len(set(row)) == top_k and set(row) <= set(range(experts)) for row in ids.tolist())


def choose(isa: str, logits: np.ndarray, top_k: int, gates: np.ndarray | None, **router: Any):
    """(ids, weights) [rows, top_k]; gates: those of the shared expert, whose logit is the last, or None."""
    ids, weights = aligned((ROWS, top_k), np.int32, -7), aligned((ROWS, top_k), np.float32)
    rig = Rig(isa)
    rig.add(
        "topk", logits=logits, ids=ids, weights=weights, shared_weights=gates, top_k=top_k, renormalise=True,
        experts=logits.shape[1] - (gates is not None), scale=2.0, **router,
    )  # fmt: skip
    rig.run(ROWS)
    return ids, weights


def test_corrections_of_a_router(isa, kind) -> None:
    """Every row is damaged by one of them."""
    correction = aligned(8, np.float32)
    correction[5] = FLOATS[kind]
    ids, weights = choose(isa, random_rows(8), 2, None, scoring=cpu_kernels.Scoring.sigmoid, correction=correction)
    assert np.isnan(weights).all() and ids.tolist() == [[0, 1]] * ROWS


def test_gate_of_a_shared_expert(isa, kind) -> None:
    def gates(logits: np.ndarray) -> np.ndarray:
        made = aligned((ROWS, 1), np.float32)
        choose(isa, logits, 1, made, **ROUTERS["softmax"])
        return made

    check(gates, random_rows(5), kind, (4,))


def test_router_scores(isa, kind) -> None:
    def scores(x: np.ndarray) -> np.ndarray:
        logits = aligned((ROWS, 6), np.float32)
        weight = np.random.default_rng(2).standard_normal((6, 70)).astype(np.float32)
        rig = Rig(isa)
        rig.add(
            "router", input=x, weight=weight, bias=None, logits=logits, experts=6, hidden=70, input_stride=x.shape[1]
        )
        rig.run(ROWS)
        return logits

    check(scores, random_rows(70), kind)


@pytest.mark.parametrize("activation", ["silu", "swiglu_clamped"])
@pytest.mark.parametrize("kind", ["ones", "inf", "-inf"])
def test_experts(isa, format, kind, activation) -> None:
    """Damage in a bias of gate, up or down of an expert, or in the weight of a row for it, is that of its rows."""
    ids = placed(np.stack([np.random.default_rng(row).permutation(6)[:2] for row in range(ROWS)]).astype(np.int32))
    weights = placed(np.random.default_rng(3).random(ids.shape).astype(np.float32))
    x, onto = random_rows(90).astype(BF16), random_rows(90)

    def outputs(where: str) -> np.ndarray:
        experts = Experts.make(format, 6, 90, 40, bias=True, activation=activation)
        given = weights.copy()
        if where == "weight":
            given[ids == 2] = FLOATS[kind]
        elif where:
            experts.biases[("gate", "up", "down").index(where)][2] = FLOATS[kind]
        return run_experts(isa, experts, x, ids, given, onto).output.copy()

    clean, damaged = outputs(""), (ids == 2).any(axis=1)
    assert 0 < damaged.sum() < ROWS
    for where in ("gate", "up", "down", "weight") if kind == "ones" else ("gate", "up"):
        made = outputs(where)
        assert not np.isfinite(made[damaged]).any(), where
        assert made[~damaged].tobytes() == clean[~damaged].tobytes(), where


def attend(isa: str, format: str, x: np.ndarray, places: list[tuple[int, int]], norms: Any = None, sinks: Any = None):
    """Keys and values are stored, and then attended to: outputs [rows, heads * head_dim] of projections x."""
    heads, kv_heads, dim = 4, 2, 24
    pages = KvPages(slots=2, heads=kv_heads, head_dim=dim, tokens=512, format=format)
    q = aligned((ROWS, heads, pages.key_dim), BF16)
    output = aligned((ROWS, row_stride(heads * dim)), BF16)
    states = aligned(2 * 2 * heads * (pages.value_dim + STATE_EXTRA), np.float32)
    rig = Rig(isa, sequences=2, positions=512)
    rig.add(
        "qkv", qkv=x, rope=None, q_norm=norms, k_norm=norms, q=q, kv=pages.layout, heads=heads, kv_heads=kv_heads,
        head_dim=dim, rope_dim=0, interleaved=False, qkv_stride=x.shape[1], eps=1e-6,
    )  # fmt: skip
    rig.add(
        "attention", q=q, output=output, states=states, sinks=sinks, kv=pages.layout, heads=heads, kv_heads=kv_heads,
        head_dim=dim, output_stride=output.shape[1], window=0, scale=dim**-0.5,
    )  # fmt: skip
    rig.step(places)
    return output[:, : heads * dim].astype(np.float32)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("format", KV_FORMATS)
@pytest.mark.parametrize("head", [1, 5, 6])  # of four of queries, two of keys, two of values
def test_attention(isa, kind, format, head, normed) -> None:
    """Damage of a query is that of its row and head; that of a key or value is also that of the tokens behind it,
    whose heads see it, and neither that of the tokens before it nor of other sequences.
    """
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (0, 2), (0, 3)]
    places = [*places[2:7], *places[:2], *places[7:]]  # rows of a sequence are adjacent; row 4 is the last of one
    damaged = 2
    x = random_rows(8 * 24)
    norms = np.ones(24, np.float32) if normed else None
    clean = attend(isa, format, x, places, norms).reshape(ROWS, 4, 24)
    for column in (0, 23):
        planted = placed(x)
        planted[damaged, head * 24 + column] = FLOATS[kind]
        made = attend(isa, format, planted, places, norms).reshape(ROWS, 4, 24)
        broken = np.zeros((ROWS, 4), bool)
        if head < 4:
            broken[damaged, head] = True
        else:
            broken[damaged:5, head % 2 * 2 : head % 2 * 2 + 2] = True
        assert not np.isfinite(made[broken]).any()
        assert made[~broken].tobytes() == clean[~broken].tobytes()


@pytest.mark.parametrize("format", KV_FORMATS)
def test_attention_of_a_long_sequence(isa, kind, format) -> None:
    """A token decodes over blocks of keys that are joined, the first of which is damaged."""
    heads, dim = 2, 24
    pages = KvPages(slots=1, heads=1, head_dim=dim, tokens=1024, format=format)
    random = np.random.default_rng(0)
    q, output = aligned((1, heads, pages.key_dim), BF16, 1), aligned((1, row_stride(heads * dim)), BF16)
    states = aligned(4 * heads * (pages.value_dim + STATE_EXTRA), np.float32)
    for which in range(2):
        qkv = aligned((1, row_stride(2 * dim)), np.float32)
        pages.write(0, *random.standard_normal((2, 1, 700, dim)).astype(BF16))
        qkv[0, : 2 * dim] = random.standard_normal(2 * dim)
        qkv[0, which * dim + 5] = FLOATS[kind]
        rig = Rig(isa, sequences=1, positions=1024)
        rig.add(
            "qkv", qkv=qkv, rope=None, q_norm=None, k_norm=None, q=None, kv=pages.layout, heads=0, kv_heads=1,
            head_dim=dim, rope_dim=0, interleaved=False, qkv_stride=qkv.shape[1], eps=1e-6,
        )  # fmt: skip
        rig.step([(0, 100)])
        rig = Rig(isa, sequences=1, positions=1024)
        rig.add(
            "attention", q=q, output=output, states=states, sinks=None, kv=pages.layout, heads=heads, kv_heads=1,
            head_dim=dim, output_stride=output.shape[1], window=0, scale=dim**-0.5,
        )  # fmt: skip
        rig.step([(0, 699)])
        assert not np.isfinite(output[0, : heads * dim].astype(np.float32)).any()


def test_sinks(isa) -> None:
    places = [(0, position) for position in range(ROWS)]
    for value in (FLOATS["nan"], FLOATS["ones"], FLOATS["inf"]):  # -inf is a sink that has no share
        sinks = np.zeros(4, np.float32)
        sinks[1] = value
        made = attend(isa, "bf16", random_rows(8 * 24), places, sinks=sinks).reshape(ROWS, 4, 24)
        assert not np.isfinite(made[:, 1]).any() and np.isfinite(made[:, [0, 2, 3]]).all()


def test_embedding(isa, kind) -> None:
    table, tokens = np.random.default_rng(0).standard_normal((40, 64)).astype(BF16), [3, 5, 3]
    table[5, 7] = FLOATS[kind].astype(BF16)
    output = aligned((3, 64), np.float32)
    rig = Rig(isa, vocab=40)
    rig.add("embed", table=packed("bf16", table)[0], output=output, hidden=64, pairs=32, output_stride=64)
    rig.run(3, tokens=tokens)
    assert not np.isfinite(output[1, 7]) and np.isfinite(output[[0, 2]]).all()


def test_combine_and_what_it_leaves(isa, kind) -> None:
    ids, weights = aligned((ROWS, 2), np.int32), aligned((ROWS, 2), np.float32, 0.5)
    ids[:, 1] = 1

    def combine(x: np.ndarray) -> np.ndarray:
        output = aligned((ROWS, 64), np.float32)
        rig = Rig(isa)
        rig.add(
            "combine", ids=ids, weights=weights, contributions=x, output=output, top_k=2, width=64, stride=64,
            output_stride=64,
        )  # fmt: skip
        contributions = x.reshape(ROWS * 2, 64)
        contributions[2 * DAMAGED] = contributions[2 * DAMAGED, 0]  # the whole of one expert's part
        rig.run(ROWS)
        assert not x.any()
        return output

    check(combine, random_rows(128), kind, (0,))


def test_short_convolution(isa, kind) -> None:
    """The state keeps damage for as long as tokens see it."""
    width, taps = 20, 3
    states = aligned((2, 768), np.uint8)
    layout = cpu_kernels.StateLayout(base=states.ctypes.data, sequence_stride=768)
    weight = placed(np.random.default_rng(0).standard_normal((width, taps)).astype(np.float32))
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]

    def convolve(x: np.ndarray) -> np.ndarray:
        states[:] = 0
        output = aligned((len(places), row_stride(width)), BF16)
        rig = Rig(isa, sequences=2)
        rig.add(
            "short_conv", input=x, weight=weight, bias=None, output=output, state=layout, width=width, taps=taps,
            input_stride=x.shape[1], output_stride=output.shape[1],
        )  # fmt: skip
        rig.step(places)
        return output[:, :width].astype(np.float32)

    x = placed(np.random.default_rng(1).standard_normal((len(places), row_stride(3 * width))).astype(np.float32))
    clean = convolve(x)
    x[3, 2 * width + 4] = FLOATS[kind]
    made = convolve(x)
    broken = np.zeros(made.shape, bool)
    broken[3:6, 4] = True
    assert not np.isfinite(made[broken]).any() and made[~broken].tobytes() == clean[~broken].tobytes()
