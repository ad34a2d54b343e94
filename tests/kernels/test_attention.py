"""Attention is within rounding, and a row's result is the same bits however the step around it is made up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from kernel_reference import assert_near, attention
from kv_pages import KvPages
from rig import BF16, Rig, aligned, random_bf16

from hybrid.program import KEY_BLOCK, STATE_EXTRA, row_stride

SHAPES = [(6, 2, 24), (8, 1, 64), (2, 2, 128), (3, 1, 40)]  # heads, KV heads, head_dim
LENGTHS = [1, 15, 16, 17, 255, 256, 257, 700]
TOKENS = 1024
Place = tuple[int, int]  # slot, position


@dataclass
class Sequences:
    """Random queries, keys and values [slots, heads, TOKENS, head_dim] of a few sequences."""

    shape: tuple[int, int, int]
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: KvPages

    @classmethod
    def make(cls, shape: tuple[int, int, int], slots: int = 3) -> Sequences:
        heads, kv_heads, dim = shape
        random = np.random.default_rng(dim)
        q, k, v = (random_bf16(random, slots, h, TOKENS, dim) for h in (heads, kv_heads, kv_heads))
        made = cls(shape, q, k, v, KvPages(slots + 1, kv_heads, dim, TOKENS))
        made.pages.fill(slots, np.nan)  # a slot that nobody reads
        made.cut([TOKENS] * slots)
        return made

    def cut(self, lengths: list[int]) -> None:
        """Keep the first tokens of every sequence; the rest of a slot reads as zero, as after a release."""
        for slot, length in enumerate(lengths):
            self.pages.fill(slot, 0)
            self.pages.write(slot, self.k[slot, :, :length], self.v[slot, :, :length])

    def run(self, isa: str, places: list[Place], *, window: int = 0, threads: int = 1) -> np.ndarray:
        """Outputs [rows, heads, head_dim] of one step."""
        heads, kv_heads, dim = self.shape
        rows, slots, stride = len(places), len(self.q) + 1, row_stride(heads * dim)
        q = aligned((rows, heads, self.pages.key_dim), BF16)
        for row, (slot, position) in enumerate(places):
            q[row, :, :dim] = self.q[slot, :, position]
        output = aligned((rows + 1, stride), BF16, fill=-7)
        states = aligned(slots * TOKENS // KEY_BLOCK * heads * (self.pages.value_dim + STATE_EXTRA), np.float32)
        rig = Rig(isa, threads, slots=slots, positions=TOKENS)
        rig.add(
            "attention",
            q=q,
            output=output,
            states=states,
            kv=self.pages.layout,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            output_stride=stride,
            window=window,
            scale=dim**-0.5,
        )
        rig.step(places)
        assert (output[rows:] == -7).all() and (output[:, heads * dim :] == -7).all()
        return output[:rows, : heads * dim].reshape(rows, heads, dim)

    def check(self, output: np.ndarray, places: list[Place], window: int = 0) -> None:
        heads, kv_heads, dim = self.shape
        for row, (slot, position) in enumerate(places):
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            for head in range(heads):
                kv = slot, head * kv_heads // heads, seen
                assert_near(
                    output[row, head], attention(self.q[slot, head, position], self.k[kv], self.v[kv], dim**-0.5)
                )


def chunk(slot: int, first: int, last: int) -> list[Place]:
    return [(slot, position) for position in range(first, last)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [0, 16, 300])
def test_decode_and_prefill_in_one_step(isa, shape, length, window) -> None:
    sequences = Sequences.make(shape)
    sequences.cut([length, length, 1])
    places = [(0, length - 1), *chunk(1, max(0, length - 20), length), (2, 0)]
    sequences.check(sequences.run(isa, places, window=window, threads=2), places, window)


@pytest.mark.parametrize("heads", [48, 49, 60])
def test_a_key_head_may_serve_more_heads_than_a_tile_has_rows(isa, heads) -> None:
    sequences = Sequences.make((heads, 1, 32))
    places = [(0, 300), *chunk(1, 254, 258)]
    sequences.check(sequences.run(isa, places, threads=2), places)


@pytest.mark.parametrize("window", [1, 2, 255, 256, 257, 600])
def test_windows_at_the_edges_of_key_blocks(isa, window) -> None:
    sequences = Sequences.make(SHAPES[0])
    places = [(0, 699), *chunk(1, 508, 530), (2, 512)]
    sequences.check(sequences.run(isa, places, window=window), places, window)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [0, 270])
def test_the_bits_of_a_row_depend_on_its_own_tokens_alone(isa, shape, window) -> None:
    """Whole, in chunks of 1 or 7, on more threads, beside other sequences."""
    sequences = Sequences.make(shape)
    whole = sequences.run(isa, chunk(0, 230, 290), window=window)
    for size in (1, 7):
        for first in range(230, 290, size):
            part = chunk(0, first, min(first + size, 290))
            expected = whole[first - 230 :][: len(part)]
            assert np.array_equal(expected, sequences.run(isa, part, window=window)), (size, first)
    for threads in (2, 3):
        assert np.array_equal(whole, sequences.run(isa, chunk(0, 230, 290), window=window, threads=threads))
    beside = sequences.run(isa, [(1, 700), *chunk(0, 230, 290), (2, 3)], window=window, threads=3)
    assert np.array_equal(whole, beside[1:-1])


def test_a_decode_row_has_the_same_bits_on_any_number_of_threads(isa) -> None:
    sequences = Sequences.make(SHAPES[1])
    places = [(0, 1000), (1, 511), (2, 90)]
    alone = [sequences.run(isa, [place])[0] for place in places]
    for threads in (1, 2, 3):
        assert np.array_equal(alone, sequences.run(isa, places, threads=threads))


def test_what_lies_behind_a_row_is_never_seen(isa) -> None:
    """Positions are written again after a rewind: later tokens may still be there, and mean nothing."""
    sequences = Sequences.make(SHAPES[0])
    places = [(0, 300), *chunk(1, 250, 270)]
    stale = sequences.run(isa, places)
    sequences.cut([301, 270, 0])
    assert np.array_equal(stale, sequences.run(isa, places))


def test_scores_far_apart_leave_the_largest_alone(isa) -> None:
    """One key so near to the query that every other weight vanishes, in any key block."""
    sequences = Sequences.make(SHAPES[0])
    for key in (0, 255, 256, 699):
        sequences.k[0, :, key] = 30
        sequences.q[0, :, 699] = 30
        sequences.cut([700, 0, 0])
        output = sequences.run(isa, [(0, 699)])
        for head in range(6):
            assert np.array_equal(output[0, head], sequences.v[0, head // 3, key])
        sequences.k[0, :, key] = -30
