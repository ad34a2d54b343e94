"""Entries that stand for several tokens: how they are made and kept, what each is worth, and what a row sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kv_pages import quantised
from rig import BF16, Rig, aligned, placed, random_bf16
from test_latent_rows import turn

import cpu_kernels
from hybrid.config import KV_FORMATS

TOKENS, DIM, ROPE, INDEX = 256, 20, 6, 20  # dimensions of attention and of the indexer, padded to 32
KEPT = 27  # keys of the last tokens
EPS = 1e-3


@pytest.fixture(params=KV_FORMATS)
def kv_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class State:
    """Of some sequences: keys of the last tokens, what the last tokens brought, entries and keys of an indexer."""

    def __init__(self, sequences: int, rate: int, sets: int, width: int, format: str = "bf16") -> None:
        self.rate, self.width, self.format = rate, width, format
        self.tokens = sets * rate + cpu_kernels.RUN_TOKENS - 1
        self.tail = KEPT * 64
        self.first = self.tail + -(-self.tokens * width * 4 // 64) * 64
        self.index = self.first + TOKENS // rate * 64
        self.pages = aligned((sequences, self.index + TOKENS // rate * 64), np.uint8)

    @property
    def layout(self) -> cpu_kernels.KvLayout:
        return cpu_kernels.KvLayout(
            base=self.pages.ctypes.data, sequence_stride=self.pages.strides[0], head_stride=0, value_offset=0,
            key_dim=32, value_dim=32, format=getattr(cpu_kernels.Format, self.format), key_scales_offset=0,
            value_scales_offset=0, shared=True, entry_offset=self.first, entry_bytes=64,
            index_offset=self.index, index_dim=32, tail_offset=self.tail,
        )  # fmt: skip

    def entries(self, sequence: int) -> np.ndarray:
        """What is stored, [entries, 32]."""
        return as_floats(self.pages[sequence, self.first : self.index], self.format)

    def keys(self, sequence: int) -> np.ndarray:
        """Of the indexer, [entries, 32]."""
        return self.pages[sequence, self.index :].view(BF16).reshape(-1, 32)


def as_floats(entries: np.ndarray, format: str) -> np.ndarray:
    """Entries of 64 bytes as what they stand for, [entries, 32]."""
    found = entries.reshape(-1, 64)
    if format == "bf16":
        return found.view(BF16).astype(np.float32)
    dtype = quantised(np.ones((1, 32), np.float32), format)[0].dtype
    return found[:, :32].copy().view(dtype).astype(np.float32) * found[:, 32:36].copy().view(np.float32)


class Compressor:
    """Random weights, and what tokens bring: values, then gates."""

    def __init__(self, rate: int, overlaps: bool, tokens: int) -> None:
        self.rate, self.sets = rate, 2 if overlaps else 1
        random = np.random.default_rng(rate)
        self.width = 2 * self.sets * DIM + 8  # and some columns of others before
        self.made = random.normal(0, 1, (tokens, self.width)).astype(np.float32)
        self.bias = placed(random.normal(0, 1, (rate, self.sets * DIM)).astype(np.float32))
        self.norm = placed(random.uniform(0.5, 1.5, DIM).astype(np.float32))
        self.angles = random.uniform(0, 6, (tokens, ROPE // 2))  # of the window that each token is in

    def run(self, isa: str, state: State, places: list[tuple[int, int]], indexes: bool = False) -> None:
        rows = [position for _, position in places]
        made, angles = placed(self.made[rows]), self.angles[rows]
        rope = placed(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
        rig = Rig(isa, 2, rows=len(rows), sequences=2, positions=TOKENS)
        rig.add(
            "compress", made=made, bias=self.bias, norm=self.norm, rope=rope, kv=state.layout, indexes=indexes, dim=DIM,
            rope_dim=ROPE, rate=self.rate, overlaps=self.sets == 2, interleaved=True, first_value=8,
            first_gate=8 + self.sets * DIM, width=self.width, tokens=state.tokens, eps=EPS,
        )  # fmt: skip
        rig.add("keep", made=made, kv=state.layout, tokens=state.tokens, width=self.width)
        rig.step(places)

    def entry(self, number: int) -> np.ndarray:
        """In double precision."""
        made = self.made.astype(np.float64)
        values, gates = made[:, 8 : 8 + self.sets * DIM], made[:, 8 + self.sets * DIM :]
        gates = gates + np.tile(self.bias, (len(made) // self.rate + 1, 1))[: len(made)]
        own = slice(number * self.rate, (number + 1) * self.rate)
        x, g = values[own, -DIM:], gates[own, -DIM:]
        if self.sets == 2 and number:
            before = slice((number - 1) * self.rate, number * self.rate)
            x, g = (np.concatenate([a[before, :DIM], b]) for a, b in ((values, x), (gates, g)))
        weights = np.exp(g - g.max(0))
        mean = (weights / weights.sum(0) * x).sum(0)
        mean = mean / np.sqrt((mean**2).mean() + EPS) * self.norm
        last = (number + 1) * self.rate - 1
        mean[-ROPE:] = turn(mean[None, -ROPE:], self.angles[last : last + 1], True)[0]
        return mean


@pytest.mark.parametrize(("rate", "overlaps"), [(4, True), (16, False), (2, False), (128, True)])
def test_entries_are_weighted_means_of_windows(isa, rate, overlaps, kv_format) -> None:
    tokens = 3 * rate - 1 if rate > 100 else 3 * rate + 1
    tokens = min(tokens, TOKENS)
    compressor = Compressor(rate, overlaps, tokens)
    state = State(2, rate, compressor.sets, compressor.width, kv_format)
    compressor.run(isa, state, [(1, position) for position in range(tokens)])
    count, found = tokens // rate, state.entries(1)
    wanted = np.stack([compressor.entry(number) for number in range(count)])
    near = {"bf16": 0.01, "int8": 0.02, "fp8": 0.08}[kv_format]
    assert np.abs(found[:count, :DIM] - wanted).max() <= near * np.abs(wanted).max()
    assert not found[:, DIM:].any() and not found[count:].any() and not state.entries(0).any()
    assert not state.pages[1, : state.tail].any() and not state.keys(1).any()


@pytest.mark.parametrize(("rate", "overlaps"), [(4, True), (16, False)])
def test_entries_are_the_same_however_a_sequence_is_cut(isa, rate, overlaps) -> None:
    compressor = Compressor(rate, overlaps, 50)
    states = []
    for cuts in ([50], [1] * 50, [3, 8, 20, 1, 1, 17], [16, 1, 33]):
        state, first = State(2, rate, compressor.sets, compressor.width), 0
        for size in cuts:
            beside = [(0, first)] if first < 50 else []
            compressor.run(isa, state, [(1, position) for position in range(first, first + size)] + beside)
            first += size
        states.append(state.pages[1])
    assert all((state == states[0]).all() for state in states)


def test_keys_of_an_indexer_lie_behind_entries_in_bf16(isa, kv_format) -> None:
    compressor = Compressor(4, True, 17)
    state = State(1, 4, 2, compressor.width, kv_format)
    compressor.run(isa, state, [(0, position) for position in range(17)], indexes=True)
    wanted = np.stack([compressor.entry(number) for number in range(4)])
    found = state.keys(0).astype(np.float32)
    assert np.abs(found[:4, :DIM] - wanted).max() <= 0.01 * np.abs(wanted).max() and not found[4:].any()
    assert not state.entries(0).any()


def seen(isa: str, places: list[tuple[int, int]], **fields: Any) -> tuple[np.ndarray, np.ndarray]:
    rows, stride = len(places), fields.pop("stride")
    positions, counts = (aligned(shape, np.int32, fill=-1) for shape in ((rows, stride), (rows,)))
    rig = Rig(isa, 2, rows=rows, sequences=4, positions=2048)
    rig.add("see", seen=positions, counts=counts, stride=stride, **fields)
    rig.step(places)
    return positions, counts


PLACES = [(0, 0), (1, 18), (1, 19), (1, 20), (2, 700), (3, 7)]


@pytest.mark.parametrize("rate", [0, 4, 128])
def test_a_row_sees_its_window_and_all_entries_that_are_finished(isa, rate) -> None:
    positions, counts = seen(
        isa, PLACES, scores=0, q=0, window=20, stride=20 + (2048 // rate if rate else 0), query_stride=0, rate=rate,
        selects=0,
    )  # fmt: skip
    for row, (_, position) in enumerate(PLACES):
        wanted = [*range(max(0, position - 19), position + 1)]
        wanted += [~entry for entry in range((position + 1) // rate if rate else 0)]
        assert positions[row, : counts[row]].tolist() == wanted


@pytest.mark.parametrize("weighted", [True, False])
def test_of_many_entries_those_with_the_largest_scores_are_seen(isa, weighted) -> None:
    """Between heads and rows of several sequences, and of more entries than a key block holds; of heads that all weigh
    the same too.
    """
    random, heads, selects, rate = np.random.default_rng(3), 5, 16, 2
    state = State(2, rate, 1, 8)
    for sequence in range(2):
        state.keys(sequence)[:] = random_bf16(random, TOKENS // rate, 32)
    places = [(0, 31), (0, 32), (0, 33), (0, 34), (1, 255)]
    q = placed(random_bf16(random, len(places) * heads, 32).reshape(len(places), heads, 32))
    weights = placed((random.normal(0, 1, (len(places), heads)) if weighted else np.ones((5, heads))).astype("f4"))
    scores, queries = aligned((len(places), 256), np.float32), aligned((len(places), 64), BF16)
    rig = Rig(isa, 2, rows=len(places), sequences=2, positions=TOKENS)
    rig.add(
        "entry_scores", q=q, weights=weights if weighted else 0, scores=scores, kv=state.layout, heads=heads, rate=rate,
        selects=selects,
    )  # fmt: skip
    rig.step(places)
    positions, counts = seen(
        isa, places, scores=scores, q=queries, window=3, stride=3 + selects, query_stride=64, rate=rate, selects=selects
    )
    for row, (sequence, position) in enumerate(places):
        entries = (position + 1) // rate
        products = np.maximum(
            np.einsum("hd,ed->he", q[row].astype("f8"), state.keys(sequence)[:entries].astype("f8")), 0
        )
        worth = weights[row].astype("f8") @ products
        if entries > selects:
            assert np.allclose(scores[row, :entries], worth, rtol=1e-3, atol=1e-3)
        chosen = np.sort(np.argsort(-worth, kind="stable")[:selects])
        assert (~positions[row, 3 : counts[row]]).tolist() == chosen.tolist()
        assert positions[row, :3].tolist() == [position - 2, position - 1, position]
    assert not queries.any()


def test_scores_that_are_no_number_show_in_the_queries(isa) -> None:
    scores, queries = aligned((1, 256), np.float32), aligned((1, 64), BF16)
    scores[0, 3] = np.nan
    fields = {"window": 3, "stride": 7, "query_stride": 64, "rate": 2, "selects": 4}
    positions, counts = seen(isa, [(0, 19)], scores=scores, q=queries, **fields)
    assert counts[0] == 7 and (~positions[0, 3:]).tolist() == [0, 1, 2, 3]
    assert np.isnan(queries.astype(np.float32)).all()


def test_tokens_of_the_pools_with_the_largest_scores_are_selected(isa) -> None:
    """And those whose pool has not ended; rows of no more pools than are selected see all."""
    random, rate, selects = np.random.default_rng(4), 4, 3
    places = [(0, 2), (1, 14), (1, 15), (2, 18), (3, 1055), (4, 1058)]  # of 0, 3, 4, 4, 264 and 264 pools
    scores, queries = aligned((len(places), 512), np.float32), aligned((len(places), 64), BF16)
    scores[:] = random.normal(0, 1, scores.shape)
    scores[4, 17] = scores[4, 40] = 9  # of equal ones the first
    scores[5, 263] = np.inf
    selected, counts = aligned((len(places), 15), np.int32, fill=-1), aligned(len(places), np.int32, fill=-1)
    rig = Rig(isa, 2, rows=len(places), sequences=5, positions=2048)
    fields = {"rate": rate, "selects": selects, "stride": 15, "query_stride": 64}
    rig.add("select_pools", scores=scores, q=queries, selected=selected, counts=counts, **fields)
    rig.step(places)
    assert counts.tolist() == [0, 0, 12, 15, 12, 15]
    for row, (_, position) in enumerate(places):
        pools = (position + 1) // rate
        chosen = np.sort(np.argsort(-scores[row, :pools], kind="stable")[:selects]) if row < 5 else np.arange(selects)
        tokens = [pool * rate + token for pool in chosen for token in range(rate)]
        tail = range(pools * rate, position + 1)
        assert selected[row, : counts[row]].tolist() == ([*tokens, *tail] if pools > selects else [])
        assert (selected[row, counts[row] :] == -1).all()
    assert not queries[:5].any() and np.isnan(queries[5].astype(np.float32)).all()


def test_pools_are_made_of_normed_tokens_as_they_are(isa) -> None:
    """Without a norm of their own, and without turning."""
    compressor = Compressor(4, False, 12)
    state = State(1, 4, 1, compressor.width)
    made = placed(compressor.made)
    rig = Rig(isa, 2, rows=12, sequences=1, positions=TOKENS)
    rig.add(
        "compress", made=made, bias=compressor.bias, norm=0, rope=0, kv=state.layout, indexes=True, dim=DIM, rope_dim=0,
        rate=4, overlaps=False, interleaved=False, first_value=8, first_gate=8 + DIM, width=compressor.width,
        tokens=state.tokens, eps=EPS,
    )  # fmt: skip
    rig.step([(0, position) for position in range(12)])
    values, gates = (made[:, first : first + DIM].astype("f8").reshape(3, 4, DIM) for first in (8, 8 + DIM))
    weights = np.exp(gates + compressor.bias)
    wanted = (weights / weights.sum(1, keepdims=True) * values).sum(1)
    assert np.abs(state.keys(0)[:3, :DIM].astype("f4") - wanted).max() <= 0.01 * np.abs(wanted).max()


def test_pools_may_be_plain_means_that_turn_by_their_first_dimensions(isa) -> None:
    """As queries beside them, which have a norm of their own."""
    compressor, rows, rate = Compressor(16, False, 50), 50, 16
    width = DIM + 8
    state, made = State(1, rate, 1, width), placed(compressor.made[:, :width])
    rope = placed(np.concatenate([np.cos(compressor.angles), np.sin(compressor.angles)], axis=1).astype(np.float32))
    places, turned = (
        [(0, position) for position in range(rows)],
        {"interleaved": False, "turns_first": True, "eps": EPS},
    )
    queries, q = placed(compressor.made), aligned((rows, 2, 32), BF16, fill=np.nan)
    rig = Rig(isa, 2, rows=rows, sequences=1, positions=TOKENS)
    rig.add(
        "compress", made=made, bias=0, norm=compressor.norm, rope=rope, kv=state.layout, indexes=True, dim=DIM,
        rope_dim=ROPE, rate=rate, overlaps=False, first_value=8, first_gate=0, width=width, tokens=state.tokens,
        **turned,
    )  # fmt: skip
    rig.add(
        "turn", queries=queries, keys=0, rope=rope, norm=0, q=q, made=0, kv=state.layout, heads=2, head_dim=DIM,
        padded_dim=32, rope_dim=ROPE, normed=False, query_stride=compressor.width, key_stride=0,
        query_norm=compressor.norm, **turned,
    )  # fmt: skip
    rig.step(places)

    def normed(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * compressor.norm

    wanted = normed(made[:48, 8:].astype("f8").reshape(3, rate, DIM).mean(1))
    wanted[:, :ROPE] = turn(wanted[:, :ROPE], compressor.angles[[15, 31, 47]], False)
    assert np.abs(state.keys(0)[:3, :DIM].astype("f4") - wanted).max() <= 0.01 * np.abs(wanted).max()
    x = normed(compressor.made[:, : 2 * DIM].astype("f8").reshape(rows, 2, DIM))
    x[..., :ROPE] = turn(x[..., :ROPE], compressor.angles[:, None], False)
    assert np.allclose(q[..., :DIM].astype("f4"), x, rtol=0.005, atol=1e-5) and not q[..., DIM:].any()


def test_queries_and_keys_turn_by_their_last_dimensions_and_back(isa, kv_format) -> None:
    random, rows, heads = np.random.default_rng(2), 5, 3
    queries, keys = (placed(random.normal(1, 2, (rows, width)).astype(np.float32)) for width in (64, 64))
    norm, angles = placed(random.uniform(0.5, 1.5, DIM).astype(np.float32)), random.uniform(0, 6, (rows, ROPE // 2))
    rope = placed(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    state, q = State(2, 4, 2, 8, kv_format), aligned((rows, heads, 32), BF16, fill=np.nan)
    fields = {"heads": heads, "head_dim": DIM, "rope_dim": ROPE, "interleaved": True}
    rig = Rig(isa, 2, rows=rows, sequences=2, positions=TOKENS)
    made = aligned((rows, 64), np.uint8, fill=255)
    rig.add(
        "turn", queries=queries, keys=keys, rope=rope, norm=norm, q=q, made=made, kv=state.layout, padded_dim=32,
        normed=True, query_stride=64, key_stride=64, eps=EPS, **fields,
    )  # fmt: skip
    rig.step([(1, position) for position in range(30, 30 + rows)])
    x = queries[:, : heads * DIM].reshape(rows, heads, DIM).astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    plain = x.copy()
    x[..., -ROPE:] = turn(x[..., -ROPE:], angles[:, None], True)
    assert np.allclose(q[..., :DIM].astype("f4"), x, rtol=0.005, atol=1e-5) and not q[..., DIM:].any()
    k = keys[:, :DIM].astype(np.float64)
    k = k / np.sqrt((k**2).mean(-1, keepdims=True) + EPS) * norm
    k[:, -ROPE:] = turn(k[:, -ROPE:], angles, True)
    stored = as_floats(made, kv_format)
    near = {"bf16": 0.005, "int8": 0.01, "fp8": 0.07}[kv_format]
    assert np.abs(stored[:, :DIM] - k).max() <= near * np.abs(k).max() and not stored[:, DIM:].any()
    assert not state.pages.any()
    values = aligned((rows, 64), BF16)
    values[:, : heads * DIM] = q[..., :DIM].reshape(rows, -1)
    rig = Rig(isa, 2, rows=rows)
    rig.add("unturn", values=values, rope=rope, stride=64, **fields)
    rig.step([(0, row) for row in range(rows)])
    assert np.allclose(values[:, : heads * DIM].astype("f4"), plain.reshape(rows, -1), rtol=0.02, atol=0.02)
