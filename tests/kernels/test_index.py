"""The indexer: keys and queries, scores, what is selected, and attention that sees no other tokens."""

from __future__ import annotations

import numpy as np
import pytest
from kv_pages import SharedPages
from rig import BF16, Rig, aligned, placed, random_bf16
from test_latent_rows import turn

from cpu_kernels import KEY_BLOCK
from hybrid.config import KV_FORMATS
from hybrid.models.layers.grouped_query_shape import STATE_EXTRA

RANK, ROPE = 50, 12
TOKENS, SELECTS = 700, 290  # more than a key block, and not a whole number of 16
# Sequence and position of each row: alone, of which key blocks are computed apart; together, before and behind the
# first row that selects; and in a block of 16 that is not full.
PLACES = [(0, TOKENS - 1), *((1, position) for position in range(SELECTS - 4, SELECTS + 5)), (2, 600), (3, 0)]
SEQUENCES = 4


@pytest.fixture(params=KV_FORMATS)
def kv_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_normed_with_a_mean_and_turned_and_queries_are_turned(isa, kv_format, interleaved) -> None:
    """By their first dimensions."""
    heads, dim, rows, eps = 3, 20, 5, 1e-3
    turned = slice(ROPE)
    random = np.random.default_rng(1)
    queries, keys = (placed(random.normal(1, 2, (rows, width)).astype(np.float32)) for width in (64, 64))
    weight, bias = (placed(random.uniform(0.5, 1.5, dim).astype(np.float32)) for _ in range(2))
    angles = random.uniform(0, 6, (rows, ROPE // 2))
    rope = placed(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    pages = SharedPages(2, RANK, ROPE, 256, kv_format, dim)
    q = aligned((rows, heads, pages.index_dim), BF16, fill=np.nan)  # what pads is written too
    rig = Rig(isa, 2, rows=rows, sequences=2, positions=256)
    rig.add(
        "index", queries=queries, keys=keys, rope=rope, norm=weight, norm_bias=bias, q=q, kv=pages.layout, heads=heads,
        head_dim=dim, rope_dim=ROPE, interleaved=interleaved, query_stride=64, key_stride=64, eps=eps,
    )  # fmt: skip
    rig.step([(1, position) for position in range(30, 30 + rows)])
    wanted = queries[:, : heads * dim].reshape(rows, heads, dim).copy()
    wanted[..., turned] = turn(wanted[..., turned], angles[:, None], interleaved)
    assert np.allclose(q[..., :dim].astype("f4"), wanted, rtol=0.005, atol=1e-5) and not q[..., dim:].any()
    x = keys[:, :dim].astype(np.float64)
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + eps) * weight + bias
    normed[:, turned] = turn(normed[:, turned], angles, interleaved)
    stored = pages.index(1).astype("f4")
    assert np.allclose(stored[30 : 30 + rows, :dim], normed, rtol=0.005, atol=1e-5) and not stored[:, dim:].any()
    assert not stored[:30].any() and not stored[30 + rows :].any() and not pages.index(0).any()
    assert not pages.rows(1).any()  # which lie before them


def scores_of(isa: str, heads: int, dim: int, threads: int, places: list) -> tuple[np.ndarray, list[np.ndarray]]:
    """Of one step: what was computed [rows, tokens], and for each row what it should be."""
    random = np.random.default_rng(heads)
    pages = SharedPages(SEQUENCES, RANK, ROPE, TOKENS, index_dim=dim)
    keys = [random_bf16(random, TOKENS, dim) for _ in range(SEQUENCES)]
    for slot, own in enumerate(keys):
        pages.write_index(slot, own)
    by_place = {place: (random_bf16(random, heads, dim), random.standard_normal(heads)) for place in PLACES}
    q, weights = aligned((len(places), heads, pages.index_dim), BF16), aligned((len(places), heads), np.float32)
    for row, place in enumerate(places):
        q[row, :, :dim], weights[row] = by_place[place]
    width = (max(position for _, position in places) // KEY_BLOCK + 1) * KEY_BLOCK
    scores = aligned((len(places), width), np.float32, fill=-7)
    rig = Rig(isa, threads, rows=len(places), sequences=SEQUENCES, positions=pages.tokens, batch_invariant=True)
    rig.add("index_scores", q=q, weights=weights, scores=scores, kv=pages.layout, heads=heads, selects=SELECTS)
    rig.step(places)
    wanted = []
    for row, (slot, position) in enumerate(places):
        products = q[row, :, :dim].astype(np.float64) @ keys[slot][: position + 1].astype(np.float64).T
        wanted.append(weights[row].astype(np.float64) @ np.maximum(products, 0))
    return scores, wanted


@pytest.mark.parametrize(("heads", "dim"), [(1, 12), (5, 70), (64, 128)])
def test_scores_add_what_is_above_zero_over_all_heads(isa, heads, dim) -> None:
    scores, wanted = scores_of(isa, heads, dim, 2, PLACES)
    for row, ((_, position), exact) in enumerate(zip(PLACES, wanted, strict=True)):
        if position < SELECTS:
            assert (scores[row] == -7).all()  # none is needed
        else:
            assert np.abs(scores[row, : position + 1] - exact).max() <= 1e-4 * np.abs(exact).max()
    again, _ = scores_of(isa, heads, dim, 3, PLACES)
    assert scores.tobytes() == again.tobytes()
    for row, place in enumerate(PLACES):
        if place[1] >= SELECTS:
            alone, _ = scores_of(isa, heads, dim, 1, [place])
            assert np.array_equal(scores[row, : place[1] + 1], alone[0, : place[1] + 1])


def select(isa: str, scores: np.ndarray, positions: list[int], selects: int) -> tuple[np.ndarray, np.ndarray]:
    """What rows at these positions select, and their queries of attention, which were ones."""
    rows = len(positions)
    width = (max(positions) // KEY_BLOCK + 1) * KEY_BLOCK
    padded = aligned((rows, width), np.float32, fill=np.inf)  # what lies behind is not looked at
    padded[:, : scores.shape[1]] = scores[:, :width]
    for row, position in enumerate(positions):
        padded[row, position + 1 :] = np.inf
    q, selected = aligned((rows, 96), BF16, fill=1), aligned((rows, selects), np.int32, fill=-7)
    rig = Rig(isa, 2, rows=rows, sequences=rows, positions=width)
    rig.add("select", scores=padded, q=q, selected=selected, selects=selects, query_stride=96)
    rig.step([(row, position) for row, position in enumerate(positions)])
    return selected, q


@pytest.mark.parametrize("values", [2, 17, 1 << 30])
@pytest.mark.parametrize("selects", [1, 16, 290])
def test_the_largest_are_selected_and_of_equal_ones_the_first(isa, values, selects) -> None:
    """Few values make many ties; among them numbers of both signs, zeros and some that differ in the last bit."""
    random = np.random.default_rng(selects)
    positions = [0, selects - 1, selects, selects + 1, 699, 511]
    scores = (random.integers(0, values, (len(positions), 700)) - values // 2).astype(np.float32)
    scores[scores == 1] = np.nextafter(np.float32(1), 2)
    selected, q = select(isa, scores, positions, selects)
    for row, position in enumerate(positions):
        if position < selects:
            assert (selected[row] == -7).all()
            continue
        order = np.lexsort((np.arange(position + 1), -scores[row, : position + 1]))
        assert np.array_equal(selected[row], np.sort(order[:selects])), position
    assert (q == 1).all()


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_spoils_its_row_alone(isa, damage) -> None:
    scores = np.random.default_rng(0).standard_normal((3, 300)).astype(np.float32)
    scores[1, 7] = damage
    selected, q = select(isa, scores, [299, 299, 299], 20)
    assert np.isnan(q[1].astype("f4")).all() and (q[::2] == 1).all()
    assert ((selected >= 0) & (selected < 300)).all()


def attend(isa: str, pages: SharedPages, queries: np.ndarray, selected: np.ndarray | None, groups: int, **options):
    """Outputs [rows, heads, RANK] of one step. options: `places` and `threads`."""
    places = options.get("places", PLACES)
    rows, heads, width = queries.shape
    q, output = aligned((rows, heads, pages.key_dim), BF16), aligned((rows, heads, RANK), BF16)
    q[..., :width] = queries
    states = aligned(4 * (TOKENS // KEY_BLOCK + 1) * heads * (pages.value_dim + STATE_EXTRA), np.float32)
    own = {} if selected is None else {"selected": placed(selected), "selects": selected.shape[1]}
    rig = Rig(isa, options.get("threads", 2), rows=rows, sequences=4, positions=pages.tokens, batch_invariant=True)
    rig.add(
        "attention", q=q, output=output, states=states, sinks=None, kv=pages.layout, heads=heads, kv_heads=groups,
        head_dim=RANK, output_stride=heads * RANK, output_head_stride=RANK, window=0, scale=0.2, **own,
    )  # fmt: skip
    rig.step(places)
    return output


@pytest.mark.parametrize(("heads", "groups"), [(6, 1), (6, 3), (60, 2)])
@pytest.mark.parametrize("selects", [SELECTS, 20])
def test_attention_sees_what_is_selected_and_nothing_else(isa, kv_format, heads, groups, selects) -> None:
    random = np.random.default_rng(heads)
    pages = SharedPages(SEQUENCES, RANK, ROPE, TOKENS, kv_format)
    queries = random_bf16(random, len(PLACES), heads, RANK + ROPE)
    for slot in range(SEQUENCES):
        pages.write(slot, random_bf16(random, TOKENS, RANK + ROPE))
    chosen = [np.sort(random.choice(max(selects, at + 1), selects, replace=False)) for _, at in PLACES]
    selected = np.array(chosen, np.int32)
    found, plain = attend(isa, pages, queries, selected, groups), attend(isa, pages, queries, None, groups)
    for row, (slot, position) in enumerate(PLACES):
        if position < selects:
            assert np.array_equal(found[row], plain[row])
            continue
        rows = pages.rows(slot)[chosen[row], : RANK + ROPE]
        scores = 0.2 * queries[row].astype(np.float64) @ rows.T
        weights = np.exp(scores - scores.max(1, keepdims=True))
        wanted = weights @ rows[:, :RANK] / weights.sum(1, keepdims=True)
        assert np.abs(found[row].astype(np.float64) - wanted).max() <= 0.02 * np.abs(wanted).max()
    assert found.tobytes() == attend(isa, pages, queries, selected, groups, threads=3).tobytes()
    for row, place in enumerate(PLACES):
        alone = attend(isa, pages, queries[row : row + 1], selected[row : row + 1], groups, places=[place])
        assert np.array_equal(found[row], alone[0])


def test_what_is_not_selected_may_be_no_number(isa, kv_format) -> None:
    random = np.random.default_rng(5)
    rows = random_bf16(random, TOKENS, RANK + ROPE)
    queries = random_bf16(random, 2, 3, RANK + ROPE)
    places = [(0, 600), (0, 601)]
    selected = np.array([np.arange(100, 120), np.arange(101, 121)], np.int32)
    outputs = []
    for damage in (0, np.nan):
        pages = SharedPages(1, RANK, ROPE, TOKENS, kv_format)
        pages.write(0, rows)
        damaged = rows.copy()
        damaged[[3, 100, 130]] = 0
        damaged[[3, 100, 130], RANK] = damage  # as the op that stores a row says it
        if kv_format == "bf16":
            pages.write(0, damaged)
        outputs.append(attend(isa, pages, queries, selected, 1, places=places))
    if kv_format == "bf16":
        assert np.isnan(outputs[1][0].astype("f4")).all()
    assert np.array_equal(outputs[0][1], outputs[1][1]) and np.isfinite(outputs[1][1].astype("f4")).all()
