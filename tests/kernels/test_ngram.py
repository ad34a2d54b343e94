"""Tables of n-grams: which rows a token looks up, what streams take of them, and what a convolution adds."""

from __future__ import annotations

import numpy as np
import pytest
from rig import BF16, Rig, aligned, placed, random_bf16, row_stride

import cpu_kernels

SEQUENCES, END, EPS = 3, 5, 1e-3
CUTS = [[20], [1] * 20, [3, 8, 9]]  # of 20 tokens


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def state(size: int) -> tuple[np.ndarray, cpu_kernels.StateLayout]:
    """Of every sequence, with so many bytes."""
    states = aligned((SEQUENCES, -(-size // 64) * 64), np.uint8)
    return states, cpu_kernels.StateLayout(base=states.ctypes.data, sequence_stride=states.shape[1])


def hashed(tokens: list[int], factors: list[int], parts: list[int], firsts: list[int], heads: int) -> np.ndarray:
    """Rows of the table [tokens, parts], by the definition, in whole numbers of any size."""
    found = []
    for place in range(len(tokens)):
        row: list[int] = []
        for size in range(2, len(factors) + 1):
            mixed = tokens[place] * factors[0]
            for back in range(1, size):
                before = tokens[max(place - back, 0) : place]
                within = place >= back and END not in before
                mixed ^= (tokens[place - back] if within else END) * factors[back]
            for part in range((size - 2) * heads, (size - 1) * heads):
                row.append(firsts[part] + mixed % parts[part])
        found.append(row)
    return np.array(found)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(("size", "heads"), [(2, 3), (4, 2), (8, 1)])
def test_rows_of_a_table_follow_from_the_last_tokens_of_a_text(isa, size, heads, cuts) -> None:
    """Whole or in chunks, beside another sequence; ends of texts among the tokens, one after its first."""
    random, parts = np.random.default_rng(size), (size - 1) * heads
    tokens = random.integers(0, 250, 20).tolist()
    tokens[0] = tokens[7] = tokens[9] = END
    factors = (random.integers(0, 1 << 54, size) * 2 + 1).tolist()
    rows_of, firsts = random.integers(50, 1 << 20, parts).tolist(), random.integers(0, 1 << 30, parts).tolist()
    numbers = placed(np.array([*factors, *rows_of, *firsts], np.int64))
    states, layout = state(cpu_kernels.ngram_state_bytes(size))
    wanted, found, first = hashed(tokens, factors, rows_of, firsts, heads), [], 0
    for count in cuts:
        ids = aligned((count + 1, parts), np.int32, fill=-1)
        rig = Rig(isa, 2, rows=count + 1, sequences=SEQUENCES)
        rig.add("ngrams", hash=numbers, ids=ids, state=layout, size=size, heads=heads, end=END)
        places = [(1, position) for position in range(first, first + count)]
        rig.step([*places, (2, first)], tokens=[*tokens[first : first + count], 77])
        found.append(ids[:count])
        first += count
    assert np.array_equal(np.concatenate(found), wanted)
    assert not states[0].any()


def test_rows_are_put_side_by_side(isa) -> None:
    random, dim, count, rows = np.random.default_rng(1), 12, 3, 4
    table, ids = placed(random_bf16(random, 40, dim)), placed(random.integers(0, 40, (rows, count)).astype(np.int32))
    output = aligned((rows, 64), BF16, fill=-7)
    rig = Rig(isa, 2, rows=rows)
    rig.add("lookup", table=table, ids=ids, output=output, dim=dim, count=count, output_stride=64)
    rig.step([(0, row) for row in range(rows)])
    assert np.array_equal(output[:, : count * dim], table[ids].reshape(rows, -1))
    assert (output[:, count * dim :] == -7).all()


@pytest.mark.parametrize(("count", "width"), [(4, 40), (1, 16), (8, 33)])
def test_a_stream_takes_as_much_as_it_is_like_its_key(isa, count, width) -> None:
    random, rows, wide = np.random.default_rng(width), 5, count * width
    projected = placed(random.normal(0, 1, (rows, row_stride(wide + width))).astype(np.float32))
    streams = placed(random.normal(0, 2, (rows, row_stride(wide))).astype(np.float32))
    projected[1, :wide] = -streams[1, :wide]  # unlike its keys
    projected[2, :wide] = 0  # neither
    key_norm, query_norm = (placed(random.uniform(0.5, 1.5, wide).astype(np.float32)) for _ in range(2))
    gates = aligned((rows, 2 * count), np.float32)
    rig = Rig(isa, 2, rows=rows)
    rig.add(
        "ngram_gate", projected=projected, streams=streams, key_norm=key_norm, query_norm=query_norm, gates=gates,
        count=count, width=width, projected_stride=projected.shape[1], stream_stride=streams.shape[1], eps=EPS,
    )  # fmt: skip
    rig.step([(0, row) for row in range(rows)])

    def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64).reshape(rows, count, width)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight.reshape(count, width)

    keys, value = normed(projected[:, :wide], key_norm), projected[:, wide : wide + width].astype(np.float64)
    likeness = (keys * normed(streams[:, :wide], query_norm)).sum(-1) / np.sqrt(width)
    taken = sigmoid(np.sign(likeness) * np.sqrt(np.maximum(np.abs(likeness), 1e-6)))
    assert (taken[1] < 0.5).all() and (taken[2] == 0.5).all()
    assert np.allclose(gates[:, :count], taken, rtol=1e-4)
    square = ((taken[..., None] * value[:, None]) ** 2).mean(-1)
    assert np.allclose(gates[:, count:], taken / np.sqrt(square + EPS), rtol=1e-4)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize(("count", "width", "taps", "dilation"), [(4, 20, 4, 3), (1, 33, 2, 1), (2, 16, 8, 8)])
def test_streams_take_a_value_and_its_convolution(isa, count, width, taps, dilation, cuts) -> None:
    random, tokens, wide = np.random.default_rng(taps), 20, count * width
    values = random.normal(0, 1, (tokens, 64)).astype(np.float32)
    gates = random.uniform(0, 1, (tokens, 2 * count)).astype(np.float32)
    old = random.normal(0, 1, (tokens, row_stride(wide))).astype(np.float32)
    norm = placed(random.uniform(0.5, 1.5, wide).astype(np.float32))
    weight = placed(random.normal(0, 1, (wide, taps)).astype(np.float32))
    states, layout = state(cpu_kernels.conv_state_bytes(wide, taps, dilation))
    found, first = [], 0
    for rows in cuts:
        now = slice(first, first + rows)
        streams = placed(old[now])
        rig = Rig(isa, 2, rows=rows, sequences=SEQUENCES)
        rig.add(
            "ngram_conv", values=placed(values[now]), gates=placed(gates[now]), norm=norm, weight=weight,
            streams=streams, state=layout, count=count, width=wide, taps=taps, dilation=dilation, value_stride=64,
            stream_stride=streams.shape[1],
        )  # fmt: skip
        rig.step([(1, position) for position in range(first, first + rows)])
        found.append(streams)
        first += rows
    value = values[:, None, :width].astype(np.float64)
    brought = np.zeros((tokens + (taps - 1) * dilation, wide))
    brought[(taps - 1) * dilation :] = (gates[:, count:, None] * value).reshape(tokens, wide) * norm
    sums = sum(brought[tap * dilation : tap * dilation + tokens] * weight[:, tap] for tap in range(taps))
    wanted = old[:, :wide] + (gates[:, :count, None] * value).reshape(tokens, wide) + sums * sigmoid(sums)
    assert np.allclose(np.concatenate(found)[:, :wide], wanted, rtol=1e-4, atol=1e-4)
    assert not states[0].any() and not states[2].any()


def test_sizes_that_no_table_has_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be from 2 to 8"):
        cpu_kernels.ngram_state_bytes(1)
    with pytest.raises(ValueError, match="dilation from 1 to 8"):
        cpu_kernels.conv_state_bytes(16, 4, 9)
