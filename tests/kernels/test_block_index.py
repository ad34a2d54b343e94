"""The indexer of blocks: norms of heads, what blocks are worth, which are selected; attention that sees no others."""

from __future__ import annotations

import numpy as np
import pytest
from kv_pages import KvPages, SharedPages
from rig import BF16, Rig, aligned, placed, random_bf16
from test_latent_rows import turn

from cpu_kernels import INDEX_BLOCK, KEY_BLOCK
from hybrid.config import KV_FORMATS
from hybrid.models.layers.grouped_query_shape import STATE_EXTRA

RANK, ROPE = 50, 12
TOKENS, SELECTS = 900, 3
# Sequence and position of each row: alone, of which key blocks are computed apart; together, before and behind the
# first row that selects; and in a block that has just begun.
FIRST = SELECTS * INDEX_BLOCK
PLACES = [(0, TOKENS - 1), *((1, at) for at in range(FIRST - 4, FIRST + 5)), (2, 512), (3, 0)]
SEQUENCES = 4


def test_queries_and_keys_are_normed_without_a_mean_and_turned(isa) -> None:
    heads, dim, rows, eps = 3, 20, 5, 1e-3
    random = np.random.default_rng(1)
    queries, keys = (placed(random.normal(1, 2, (rows, width)).astype(np.float32)) for width in (64, 64))
    weight, query_weight = (placed(random.uniform(0.5, 1.5, dim).astype(np.float32)) for _ in range(2))
    angles = random.uniform(0, 6, (rows, ROPE // 2))
    rope = placed(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    pages = SharedPages(2, RANK, ROPE, 256, "bf16", dim)
    q = aligned((rows, heads, pages.index_dim), BF16, fill=np.nan)  # what pads is written too
    rig = Rig(isa, 2, rows=rows, sequences=2, positions=256)
    rig.add(
        "index", queries=queries, keys=keys, rope=rope, norm=weight, norm_bias=None, query_norm=query_weight, q=q,
        kv=pages.layout, heads=heads, head_dim=dim, rope_dim=ROPE, interleaved=False, query_stride=64, key_stride=64,
        eps=eps,
    )  # fmt: skip
    rig.step([(1, position) for position in range(30, 30 + rows)])

    def made(x: np.ndarray, weight: np.ndarray, angles: np.ndarray) -> np.ndarray:
        normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight
        normed[..., :ROPE] = turn(normed[..., :ROPE], angles, False)
        return normed

    heads_of = queries[:, : heads * dim].reshape(rows, heads, dim).astype(np.float64)
    assert np.allclose(q[..., :dim].astype("f4"), made(heads_of, query_weight, angles[:, None]), rtol=0.005, atol=1e-5)
    assert not q[..., dim:].any()
    stored = pages.index(1).astype("f4")[30 : 30 + rows]
    assert np.allclose(stored[:, :dim], made(keys[:, :dim].astype(np.float64), weight, angles), rtol=0.005, atol=1e-5)


def worth(isa: str, heads: int, dim: int, threads: int, places: list, damage: float = 0.0) -> tuple:
    """Of one step: what was computed [rows, heads, blocks], and for each row what it should be [heads, blocks]."""
    random = np.random.default_rng(heads)
    pages = SharedPages(SEQUENCES, RANK, ROPE, TOKENS, index_dim=dim)
    keys = [random_bf16(random, TOKENS, dim) for _ in range(SEQUENCES)]
    if damage:
        keys[0][300, 0] = damage
    for slot, own in enumerate(keys):
        pages.write_index(slot, own)
    by_place = {place: random_bf16(random, heads, dim) for place in PLACES}
    q = aligned((len(places), heads, pages.index_dim), BF16)
    for row, place in enumerate(places):
        q[row, :, :dim] = by_place[place]
    blocks = (max(position for _, position in places) // KEY_BLOCK + 1) * (KEY_BLOCK // INDEX_BLOCK)
    scores = aligned((len(places), heads, blocks), np.float32, fill=-7)
    rig = Rig(isa, threads, rows=len(places), sequences=SEQUENCES, positions=pages.tokens, batch_invariant=True)
    rig.add("block_scores", q=q, scores=scores, kv=pages.layout, heads=heads, selects=SELECTS)
    rig.step(places)
    wanted = []
    for row, (slot, position) in enumerate(places):
        products = q[row, :, :dim].astype(np.float64) @ keys[slot][: position + 1].astype(np.float64).T
        starts = range(0, position + 1, INDEX_BLOCK)
        wanted.append(np.stack([products[:, at : at + INDEX_BLOCK].max(1) for at in starts], axis=1))
    return scores, wanted


@pytest.mark.parametrize(("heads", "dim"), [(1, 12), (4, 128), (5, 70)])
def test_a_block_is_worth_its_largest_product(isa, heads, dim) -> None:
    scores, wanted = worth(isa, heads, dim, 2, PLACES)
    for row, ((_, position), exact) in enumerate(zip(PLACES, wanted, strict=True)):
        if position < FIRST:
            assert (scores[row] == -7).all()  # none is needed
        else:
            found = scores[row, :, : exact.shape[1]]
            assert np.abs(found - exact).max() <= 1e-4 * np.abs(exact).max()
            assert (scores[row, :, exact.shape[1] :] == -7).all()
    again, _ = worth(isa, heads, dim, 3, PLACES)
    assert scores.tobytes() == again.tobytes()


def test_a_product_that_is_no_number_is_what_its_block_is_worth(isa) -> None:
    scores, _ = worth(isa, 2, 12, 2, PLACES, damage=np.nan)
    assert np.isnan(scores[0, :, 300 // INDEX_BLOCK]).all() and np.isfinite(scores[0, :, :2]).all()


def select(isa: str, scores: np.ndarray, positions: list[int], selects: int) -> tuple[np.ndarray, np.ndarray]:
    """What heads of rows at these positions select, and their queries of attention, which were ones."""
    rows, heads, _ = scores.shape
    blocks = (max(positions) // KEY_BLOCK + 1) * (KEY_BLOCK // INDEX_BLOCK)
    padded = aligned((rows, heads, blocks), np.float32, fill=np.inf)  # what lies behind is not looked at
    for row, position in enumerate(positions):
        padded[row, :, : position // INDEX_BLOCK + 1] = scores[row, :, : position // INDEX_BLOCK + 1]
    q, selected = aligned((rows, 96), BF16, fill=1), aligned((rows, heads, selects), np.int32, fill=-7)
    rig = Rig(isa, 2, rows=rows, sequences=rows, positions=blocks * INDEX_BLOCK)
    rig.add("select_blocks", scores=padded, q=q, selected=selected, heads=heads, selects=selects, query_stride=96)
    rig.step([(row, position) for row, position in enumerate(positions)])
    return selected, q


@pytest.mark.parametrize("values", [2, 1 << 30])
@pytest.mark.parametrize("selects", [1, 2, 5])
def test_its_own_block_and_the_best_before_it_are_selected(isa, values, selects) -> None:
    """Of equal ones the first; few values make many ties."""
    random = np.random.default_rng(selects)
    positions = [0, selects * INDEX_BLOCK - 1, selects * INDEX_BLOCK, 20 * INDEX_BLOCK + 5, 19 * INDEX_BLOCK]
    scores = (random.integers(0, values, (len(positions), 3, 40)) - values // 2).astype(np.float32)
    selected, q = select(isa, scores, positions, selects)
    for row, position in enumerate(positions):
        own = position // INDEX_BLOCK
        for head in range(3):
            if own < selects:
                assert (selected[row, head] == -7).all()
                continue
            order = np.lexsort((np.arange(own), -scores[row, head, :own]))
            assert np.array_equal(selected[row, head], [*np.sort(order[: selects - 1]), own])
    assert (q == 1).all()


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_spoils_its_row_alone(isa, damage) -> None:
    scores = np.random.default_rng(0).standard_normal((3, 2, 12)).astype(np.float32)
    scores[1, 1, 7] = damage
    selected, q = select(isa, scores, [12 * INDEX_BLOCK - 1] * 3, 4)
    assert np.isnan(q[1].astype("f4")).all() and (q[::2] == 1).all()
    assert ((selected >= 0) & (selected < 12)).all()


def attend(isa: str, pages: KvPages, queries: np.ndarray, blocks: np.ndarray | None, **options) -> np.ndarray:
    """Outputs [rows, heads, dim] of one step. options: `places` and `threads`."""
    places = options.get("places", PLACES)
    rows, heads, dim = queries.shape
    q, output = aligned((rows, heads, pages.key_dim), BF16), aligned((rows, heads * dim), BF16)
    q[..., :dim] = queries
    states = aligned(4 * (TOKENS // KEY_BLOCK + 1) * heads * (pages.value_dim + STATE_EXTRA), np.float32)
    own = {} if blocks is None else {"blocks": placed(blocks), "block_count": blocks.shape[2]}
    rig = Rig(isa, options.get("threads", 2), rows=rows, sequences=4, positions=pages.tokens, batch_invariant=True)
    rig.add(
        "attention", q=q, output=output, states=states, sinks=None, kv=pages.layout, heads=heads, kv_heads=pages.heads,
        head_dim=dim, output_stride=heads * dim, window=0, scale=0.2, **own,
    )  # fmt: skip
    rig.step(places)
    return output.reshape(rows, heads, dim)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(6, 2, 24), (4, 4, 64), (16, 1, 128)])
def test_each_kv_head_sees_its_blocks_and_nothing_else(isa, kv_format, heads, groups, dim) -> None:
    random = np.random.default_rng(heads)
    pages = KvPages(SEQUENCES, groups, dim, TOKENS, kv_format)
    queries = random_bf16(random, len(PLACES), heads, dim)
    for slot in range(SEQUENCES):
        pages.write(slot, *(random_bf16(random, groups, TOKENS, dim) for _ in range(2)))
    blocks = np.full((len(PLACES), groups, SELECTS), 1 << 20, np.int32)
    for row, (_, position) in enumerate(PLACES):
        own = position // INDEX_BLOCK
        for head in range(groups if own >= SELECTS else 0):
            blocks[row, head] = [*np.sort(random.choice(own, SELECTS - 1, replace=False)), own]
    found, plain = attend(isa, pages, queries, blocks), attend(isa, pages, queries, None)
    for row, (slot, position) in enumerate(PLACES):
        if position < FIRST:
            assert np.array_equal(found[row], plain[row])
            continue
        for head in range(heads):
            own = head // (heads // groups)
            at = np.concatenate([np.arange(b * INDEX_BLOCK, (b + 1) * INDEX_BLOCK) for b in blocks[row, own]])
            at = at[at <= position]
            keys, values = (array[own, at, :dim].astype(np.float64) for array in (pages.keys(slot), pages.values(slot)))
            scores = 0.2 * keys @ queries[row, head].astype(np.float64)
            weights = np.exp(scores - scores.max())
            wanted = weights @ values / weights.sum()
            assert np.abs(found[row, head].astype(np.float64) - wanted).max() <= 0.03 * np.abs(wanted).max()
    assert found.tobytes() == attend(isa, pages, queries, blocks, threads=3).tobytes()
    for row, place in enumerate(PLACES):
        alone = attend(isa, pages, queries[row : row + 1], blocks[row : row + 1], places=[place])
        assert np.array_equal(found[row], alone[0])
