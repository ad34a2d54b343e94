"""Attention is within rounding, and a row's result is the same bits however the step around it is made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import ml_dtypes
import numpy as np
import pytest
from kernel_reference import BF16 as BF16_ROUNDING
from kernel_reference import Near, assert_near, attention
from kv_pages import KvPages
from rig import BF16, Rig, aligned, placed, random_bf16

import cpu_kernels
from cpu_kernels import KEY_BLOCK
from hybrid.config import KV_FORMATS
from hybrid.formats.rows import row_stride
from hybrid.models.layers.grouped_query_shape import STATE_EXTRA

SHAPES = [(6, 2, 24), (8, 1, 64), (2, 2, 128), (3, 1, 40), (9, 1, 96)]  # heads, KV heads, head_dim
LENGTHS = [1, 15, 16, 17, 255, 256, 257, 700]
TOKENS = 1024
Place = tuple[int, int]  # slot, position
KeysValues = tuple[np.ndarray, np.ndarray]  # float64 [KV heads, TOKENS, their size]
Stored = dict[int, KeysValues]  # by slot


@pytest.fixture(params=KV_FORMATS)
def kv_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def random_rows(shape: tuple[int, int, int], slots: int, value_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values of `Sequences`, the same at every call: to be copied, not written."""
    (heads, kv_heads, dim), random = shape, np.random.default_rng(shape[2])
    counts = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    q, k, v = (random_bf16(random, slots, h, TOKENS, size) for h, size in counts)
    return q, k, v


@dataclass
class Sequences:
    """Random queries, keys and values [slots, heads, TOKENS, head_dim] of a few sequences, and a sink a head."""

    shape: tuple[int, int, int]
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: KvPages
    sinks: np.ndarray | None = None
    cap: float = 0.0

    @classmethod
    def make(
        cls,
        shape: tuple[int, int, int],
        format: str = "bf16",
        slots: int = 3,
        value_dim: int | None = None,
        lengths: Sequence[int] = (),
    ) -> Sequences:
        """lengths: of the sequences, as `cut` takes them; by default all are TOKENS long."""
        _, kv_heads, dim = shape
        q, k, v = (part.copy() for part in random_rows(shape, slots, value_dim or dim))
        made = cls(shape, q, k, v, KvPages(slots + 1, kv_heads, dim, TOKENS, format, value_dim or 0))
        made.pages.fill(slots, np.nan)  # a slot that nobody reads
        made.cut(lengths or [TOKENS] * slots)
        return made

    def cut(self, lengths: Sequence[int]) -> None:
        """Keep the first tokens of every sequence; the rest of a slot reads as zero, as after a release."""
        for slot, length in enumerate(lengths):
            self.pages.fill(slot, 0)
            self.pages.write(slot, self.k[slot, :, :length], self.v[slot, :, :length])

    def run(
        self,
        isa: str,
        places: list[Place],
        *,
        window: int = 0,
        threads: int = 1,
        invariant: bool = False,
        **more: np.ndarray,
    ) -> np.ndarray:
        """Outputs [rows, heads, head_dim] of one step. more: arguments of the op.

        invariant: by kernels whose bits do not depend on the number of rows.
        """
        (heads, kv_heads, dim), out = self.shape, self.v.shape[-1]
        rows, slots, stride = len(places), len(self.q) + 1, row_stride(heads * out)
        q = aligned((rows, heads, self.pages.key_dim), BF16)
        for row, (slot, position) in enumerate(places):
            q[row, :, :dim] = self.q[slot, :, position]
        output = aligned((rows + 1, stride), BF16, fill=-7)
        states = aligned(slots * TOKENS // KEY_BLOCK * heads * (self.pages.value_dim + STATE_EXTRA), np.float32)
        rig = Rig(isa, threads, rows=rows, sequences=slots, positions=TOKENS, batch_invariant=invariant)
        rig.add(
            "attention",
            q=q,
            output=output,
            states=states,
            sinks=self.sinks,
            kv=self.pages.layout,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=out,
            output_stride=stride,
            window=window,
            scale=dim**-0.5,
            score_cap=self.cap,
            **more,
        )
        rig.step(places)
        assert (output[rows:] == -7).all() and (output[:, heads * out :] == -7).all()
        return output[:rows, : heads * out].reshape(rows, heads, out)

    def stored(self, slot: int) -> KeysValues:
        """What its keys and values stand for."""
        keys, values = self.pages.keys(slot), self.pages.values(slot)
        exact = partial(np.asarray, dtype=np.float64)
        return exact(keys[..., : self.shape[2]]), exact(values[..., : self.v.shape[-1]])

    def check(self, output: np.ndarray, places: list[Place], window: int = 0, stored: Stored | None = None) -> None:
        """stored: what its slots hold, if that is known."""
        stored = stored or {slot: self.stored(slot) for slot in {slot for slot, _ in places}}
        for row, (slot, position) in enumerate(places):
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            assert_near(output[row], self.expected((slot, position), *(part[:, seen] for part in stored[slot])))

    def expected(self, place: Place, keys: np.ndarray, values: np.ndarray) -> Near:
        """The result [heads, size] of a row over the keys and values [KV heads, n, ..] that it sees."""
        (heads, kv_heads, dim), (slot, position) = self.shape, place
        found = []
        for group, (k, v) in enumerate(zip(keys, values, strict=True)):
            part = slice(group * heads // kv_heads, (group + 1) * heads // kv_heads)
            sinks = None if self.sinks is None else self.sinks[part].astype(np.float64)
            found.append(attention(self.q[slot, part, position], k, v, dim**-0.5, sinks, self.cap))
        return Near(*(np.concatenate([getattr(one, part) for one in found]) for part in ("value", "bound")))


def chunk(slot: int, first: int, last: int) -> list[Place]:
    return [(slot, position) for position in range(first, last)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [0, 16, 300])
def test_decode_and_prefill_in_one_step(isa, kv_format, shape, length, window) -> None:
    sequences = Sequences.make(shape, kv_format, lengths=[length, length, 1])
    places = [(0, length - 1), *chunk(1, max(0, length - 20), length), (2, 0)]
    sequences.check(sequences.run(isa, places, window=window, threads=2), places, window)


@pytest.mark.parametrize("heads", [48, 49, 96, 97, 120])
def test_a_key_head_may_serve_more_heads_than_a_tile_has_rows(isa, kv_format, heads) -> None:
    sequences = Sequences.make((heads, 1, 32), kv_format)
    places = [(0, 300), *chunk(1, 254, 258)]
    sequences.check(sequences.run(isa, places, threads=2), places)


@pytest.mark.parametrize("window", [1, 2, 255, 256, 257, 600])
def test_windows_at_the_edges_of_key_blocks(isa, kv_format, window) -> None:
    sequences = Sequences.make(SHAPES[0], kv_format)
    places = [(0, 699), *chunk(1, 508, 530), (2, 512)]
    sequences.check(sequences.run(isa, places, window=window), places, window)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [0, 270])
def test_the_bits_of_a_row_depend_on_its_own_tokens_alone(isa, kv_format, shape, window) -> None:
    """Whole, in chunks of 1 or 7, on more threads, beside other sequences."""
    sequences = Sequences.make(shape, kv_format)
    sequences.sinks = sinks_of(shape)
    run = partial(sequences.run, isa, window=window, invariant=True)
    whole = run(chunk(0, 230, 290))
    for size in (1, 7):
        for first in range(230, 290, size):
            part = chunk(0, first, min(first + size, 290))
            expected = whole[first - 230 :][: len(part)]
            assert np.array_equal(expected, run(part)), (size, first)
    for threads in (2, 3):
        assert np.array_equal(whole, run(chunk(0, 230, 290), threads=threads))
    beside = run([(1, 700), *chunk(0, 230, 290), (2, 3)], threads=3)
    assert np.array_equal(whole, beside[1:-1])


def test_the_larger_tiles_of_a_step_of_many_rows_give_the_bits_of_small_ones(isa, kv_format) -> None:
    """The last tile is not full, and only two of three sequences have so many rows that they are cut."""
    sequences = Sequences.make((64, 2, 8), kv_format)
    run = partial(sequences.run, isa, invariant=True, threads=2)
    places = [*chunk(0, 300, 400), *chunk(1, 0, 100), (2, 700)]
    assert len(places) * 64 > 128 * cpu_kernels.TILE_ROWS
    whole = run(places)
    sequences.check(whole, places)
    parts = [run(places[first : first + 33]) for first in range(0, len(places), 33)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_a_decode_row_has_the_same_bits_on_any_number_of_threads(isa, kv_format) -> None:
    sequences = Sequences.make(SHAPES[1], kv_format)
    places = [(0, 1000), (1, 511), (2, 90)]
    alone = [sequences.run(isa, [place])[0] for place in places]
    for threads in (1, 2, 3):
        assert np.array_equal(alone, sequences.run(isa, places, threads=threads))


@pytest.mark.parametrize("shape", SHAPES)
def test_how_keys_are_read_changes_no_bit(isa, kv_format, shape) -> None:
    """Of a row alone and of a few."""
    sequences = Sequences.make(shape, kv_format)
    before = cpu_kernels.reading()
    try:
        for places in ([(0, 700)], chunk(0, 300, 303)):
            found = []
            for way in cpu_kernels.Reading:
                cpu_kernels.reading(way)
                found.append(sequences.run(isa, places))
            assert all(np.array_equal(found[0], other) for other in found[1:])
    finally:
        cpu_kernels.reading(before)


def test_what_lies_behind_a_row_is_never_seen(isa, kv_format) -> None:
    """Positions are written again after a rewind: later tokens may still be there, and mean nothing."""
    sequences = Sequences.make(SHAPES[0], kv_format)
    places = [(0, 300), *chunk(1, 250, 270)]
    stale = sequences.run(isa, places)
    sequences.cut([301, 270, 0])
    assert np.array_equal(stale, sequences.run(isa, places))


@pytest.mark.parametrize("kv_format", [name for name in KV_FORMATS if name != "bf16"])
@pytest.mark.parametrize("stale", [np.nan, np.inf])
def test_scales_behind_a_row_mean_nothing(isa, kv_format, stale) -> None:
    sequences = Sequences.make(SHAPES[0], kv_format)
    places, lengths = [(0, 300), *chunk(1, 250, 270)], [301, 270, 0]
    sequences.cut(lengths)
    clean = sequences.run(isa, places)
    for slot, length in enumerate(lengths):
        sequences.pages.fill_scales(slot, stale)
        sequences.pages.write(slot, sequences.k[slot, :, :length], sequences.v[slot, :, :length])
    assert np.array_equal(clean, sequences.run(isa, places))


def test_scores_far_apart_leave_the_largest_alone(isa, kv_format) -> None:
    """One key so near to the query that every other weight vanishes, in any key block."""
    sequences = Sequences.make(SHAPES[0], kv_format)
    for key in (0, 255, 256, 699):
        sequences.k[0, :, key] = 30
        sequences.q[0, :, 699] = 30
        sequences.cut([700, 0, 0])
        output, values = sequences.run(isa, [(0, 699)]), sequences.pages.values(0)[:, key, :24].astype(np.float64)
        # Where the weight is a scale, it is rounded, as is the result; the others are e^-87 of it.
        bound = np.zeros_like(values) if kv_format == "bf16" else 2.02 * BF16_ROUNDING * np.abs(values) + 1e-30
        for head in range(6):
            assert_near(output[0, head], Near(values[head // 3], bound[head // 3]))
        sequences.k[0, :, key] = -30


@pytest.mark.parametrize("heads", [1, 6, 13])
def test_every_code_of_fp8_stands_for_its_value(isa, heads) -> None:
    """The only token of a sequence is what attention makes of it."""
    sequences = Sequences.make((heads, 1, 128), "fp8")
    codes = np.minimum(np.arange(128), 126).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)  # 448 makes the scale 1
    sequences.v[0, 0, 0], sequences.v[1, 0, 0] = codes, -codes
    sequences.cut([1, 1, 0])
    output = sequences.run(isa, [(0, 0), (1, 0)])
    for row in range(2):
        assert np.array_equal(output[row], np.broadcast_to(sequences.v[row, 0, 0], output[row].shape))


def sinks_of(shape: tuple[int, int, int]) -> np.ndarray:
    """From far below all scores to far above them."""
    return placed(np.linspace(-20, 20, shape[0]).astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("window", [0, 16, 300])
def test_sinks_share_in_the_softmax(isa, kv_format, shape, window) -> None:
    sequences = Sequences.make(shape, kv_format)
    places = [(0, 699), *chunk(1, 250, 270), (2, 0)]
    plain = sequences.run(isa, places, window=window)
    sequences.sinks = sinks_of(shape)
    output = sequences.run(isa, places, window=window, threads=2)
    sequences.check(output, places, window)
    assert (np.abs(output[:, -1]).max(-1) < 1e-3 * np.abs(plain[:, -1]).max(-1)).all()  # the last takes nearly all


@pytest.mark.parametrize(("shape", "value_dim"), [((6, 2, 24), 20), ((8, 1, 192), 128), ((2, 2, 40), 64)], ids=str)
@pytest.mark.parametrize("window", [0, 270])
def test_values_may_be_of_another_size_than_keys(isa, kv_format, shape, value_dim, window) -> None:
    sequences = Sequences.make(shape, kv_format, value_dim=value_dim)
    sequences.sinks = sinks_of(shape)
    places = [(0, 0), (1, 700), *chunk(2, 250, 262)]
    sequences.check(sequences.run(isa, places, window=window, threads=2), places, window)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("cap", [0.5, 50.0])
def test_scores_may_have_bounds(isa, kv_format, shape, cap) -> None:
    """The scores of the first are nearly all at their bounds, those of the second nearly as they were."""
    sequences = Sequences.make(shape, kv_format)
    sequences.cap = cap
    sequences.q[:] *= 4
    places = [(0, 0), (1, 700), *chunk(2, 250, 262)]
    sequences.check(sequences.run(isa, places, threads=2), places)


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_bounds_of_scores_hide_no_damage(isa, damage) -> None:
    sequences = Sequences.make(SHAPES[0])
    sequences.cap = 2.0
    sequences.k[0, 0, 5, 3] = damage
    sequences.cut([TOKENS] * 3)
    found = sequences.run(isa, [(0, 4), (0, 5), (1, 5)]).astype(np.float32)
    assert np.isnan(found[1, :3]).all() and np.isfinite(found[[0, 2]]).all() and np.isfinite(found[1, 3:]).all()


def test_a_sink_far_below_all_scores_changes_no_bit(isa, kv_format) -> None:
    sequences = Sequences.make(SHAPES[0], kv_format)
    places = [(0, 699), *chunk(1, 250, 270)]
    plain = sequences.run(isa, places)
    for low in (-1e4, -np.inf):
        sequences.sinks = placed(np.full(6, low, np.float32))
        assert np.array_equal(plain, sequences.run(isa, places))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [0, 16, 300])
@pytest.mark.parametrize("split", [0, 1, 250, 256, 257, 490])
def test_states_of_the_keys_up_to_a_split_join_those_behind_it(isa, kv_format, shape, window, split) -> None:
    """What a split leaves is a softmax of its own: with that of the other keys, by hand, it gives the whole."""
    sequences = Sequences.make(shape, kv_format)
    sequences.sinks = sinks_of(shape)
    places = [(0, 699), *chunk(1, 490, 500), (2, 0)]
    ends = placed(np.array([split] * (len(places) - 1) + [0], np.int32))
    states = aligned((len(places), shape[0], sequences.pages.value_dim + STATE_EXTRA), np.float32, fill=np.nan)
    output = sequences.run(isa, places, window=window, threads=2, ends=ends, partials=states)
    assert (output == -7).all()  # nothing but states
    stored = {slot: sequences.stored(slot) for slot in range(3)}
    joined = np.stack(
        [
            join_rest(sequences, place, stored[place[0]], end, state, window)
            for place, end, state in zip(places, ends, states, strict=True)
        ]
    )
    sequences.check(joined.astype(BF16), places, window, stored)


def join_rest(
    sequences: Sequences,
    place: Place,
    stored: KeysValues,
    end: int,
    states: np.ndarray,
    window: int,
) -> np.ndarray:
    """The result of a row, [heads, head_dim], of the states [heads, ..] of its keys before `end`.

    stored: the keys and values of its slot, as `Sequences` has them.
    """
    (slot, position), (heads, kv_heads, dim) = place, sequences.shape
    first = max(end, position - window + 1 if window else 0)
    keys, values = (part[:, first : position + 1] for part in stored)
    found = []
    for head in range(heads):
        values_before, (top, total) = states[head, :dim], states[head, sequences.pages.value_dim :][:2]
        if not end or (window and position - window + 1 >= end):
            assert (top, total) == (-np.inf, 0)
            values_before = np.zeros(dim)
        group = head * kv_heads // heads
        scores = keys[group] @ sequences.q[slot, head, position].astype(np.float64) * dim**-0.5
        sink = float(sequences.sinks[head])
        highest = max(top, sink, scores.max(initial=-np.inf))
        weights, before = np.exp(scores - highest), np.exp(float(top) - highest)
        summed = before * values_before + weights @ values[group]
        found.append(summed / (before * total + weights.sum() + np.exp(sink - highest)))
    return np.array(found)


@pytest.mark.parametrize("shape", [(6, 2, 24), (9, 1, 96)], ids=str)
def test_rows_see_the_tokens_that_they_select(isa, kv_format, shape) -> None:
    """Single ones and pairs, of more than a key block; rows that count none see all."""
    sequences, random = Sequences.make(shape, kv_format), np.random.default_rng(1)
    places = [(0, 700), *chunk(1, 296, 301), (2, 1000), (2, 1001)]
    counts, selected = [291, 0, 0, 290, 40, 299, 17, 300], aligned((len(places), 300), np.int32, fill=1 << 20)
    for row, (count, (_, position)) in enumerate(zip(counts, places, strict=True)):
        pairs = random.choice((position + 1) // 2, count // 2, replace=False) * 2
        selected[row, :count] = np.sort([*pairs, *pairs + 1, *[position] * (count % 2)])
    more = {"selected": selected, "selects": 300, "counts": placed(np.array(counts, np.int32))}
    found = sequences.run(isa, places, threads=2, invariant=True, **more)
    plain = sequences.run(isa, places, invariant=True)
    stored = [sequences.stored(slot) for slot in range(3)]
    for row, (slot, position) in enumerate(places):
        if not counts[row]:
            assert np.array_equal(found[row], plain[row])
            continue
        seen = selected[row, : counts[row]]
        assert_near(found[row], sequences.expected((slot, position), *(part[:, seen] for part in stored[slot])))
        alone = {"selected": placed(selected[row : row + 1]), "selects": 300, "counts": more["counts"][row : row + 1]}
        alone["counts"] = placed(alone["counts"])
        assert np.array_equal(found[row], sequences.run(isa, [(slot, position)], invariant=True, **alone)[0])
