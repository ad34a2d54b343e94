"""Latent attention: one row a token for all heads, stored once, and the small matrices of heads around it."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_reference import rounded_on_tiles
from kv_pages import KvPages, SharedPages
from rig import (
    BF16,
    Rig,
    aligned,
    dequantised_rows,
    format_of,
    other_on_tiles,
    packed,
    random_bf16,
    rows_of,
)

from cpu_kernels import KEY_BLOCK
from hybrid.config import KV_FORMATS
from hybrid.formats import FORMATS
from hybrid.formats.rows import row_stride
from hybrid.models.layers.grouped_query_shape import STATE_EXTRA

RANK, ROPE = 50, 12
TOKENS = 700
PLACES = [(0, TOKENS - 1), *((1, position) for position in range(250, 262)), (2, 0)]


@pytest.fixture(params=KV_FORMATS)
def kv_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def attend(
    isa: str, pages: KvPages | SharedPages, queries: np.ndarray, kv_heads: int, dim: int, threads: int = 1
) -> np.ndarray:
    """Outputs [rows, heads, dim] of one step at PLACES, written 64 apart."""
    rows, heads, width = queries.shape
    q = aligned((rows, heads, pages.key_dim), BF16)
    q[..., :width] = queries
    output = aligned((rows, heads, 64), BF16, fill=-7)
    states = aligned(4 * (TOKENS // KEY_BLOCK + 1) * heads * (pages.value_dim + STATE_EXTRA), np.float32)
    rig = Rig(isa, threads, rows=rows, sequences=4, positions=pages.tokens, batch_invariant=True)
    rig.add(
        "attention", q=q, output=output, states=states, sinks=None, kv=pages.layout, heads=heads, kv_heads=kv_heads,
        head_dim=dim, output_stride=heads * 64, output_head_stride=64, window=0, scale=0.2,
    )  # fmt: skip
    rig.step(PLACES)
    assert (output[..., dim:] == -7).all()
    return output[..., :dim].copy()


@pytest.mark.parametrize(("heads", "groups"), [(6, 1), (6, 3), (60, 2)])
def test_shared_rows_give_the_bits_of_keys_and_values_stored_apart(isa, kv_format, heads, groups) -> None:
    """Values are the first dimensions of keys; with an int8 or fp8 row both have the scale of the whole row."""
    random = np.random.default_rng(heads)
    queries = random_bf16(random, len(PLACES), heads, RANK + ROPE)
    shared, apart = SharedPages(4, RANK, ROPE, TOKENS, kv_format), KvPages(4, 1, RANK + ROPE, TOKENS, kv_format)
    for slot in range(3):
        rows = random_bf16(random, TOKENS, RANK + ROPE)
        shared.write(slot, rows)
        apart.write(slot, rows[None], rows[None])
        assert np.array_equal(shared.rows(slot)[:TOKENS, : RANK + ROPE], apart.keys(slot)[0, :TOKENS, : RANK + ROPE])
    found = attend(isa, shared, queries, groups, RANK)
    assert found.tobytes() == attend(isa, shared, queries, groups, RANK, threads=3).tobytes()
    assert found.tobytes() == np.ascontiguousarray(attend(isa, apart, queries, 1, RANK + ROPE)[..., :RANK]).tobytes()


@pytest.mark.parametrize("growth", [None, 0.3])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rows_are_normed_turned_and_stored(isa, kv_format, interleaved, growth) -> None:
    """growth: of late queries, a step every 16 positions; what is stored does not grow."""
    heads, nope, rows, eps = 3, 20, 5, 1e-3
    random = np.random.default_rng(1)
    queries, latents = (aligned((rows, width), np.float32) for width in (128, 64))
    queries[:], latents[:] = random.standard_normal(queries.shape), random.standard_normal(latents.shape)
    weight, angles = aligned(RANK, np.float32), random.uniform(0, 6, (rows, ROPE // 2))
    weight[:] = random.uniform(0.5, 1.5, RANK)
    rope = aligned((rows, ROPE), np.float32)
    rope[:] = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    pages = SharedPages(2, RANK, ROPE, 256, kv_format)
    plain, q = aligned((rows, heads, 64), BF16), aligned((rows, heads, pages.key_dim), BF16)
    rig = Rig(isa, 2, rows=rows, sequences=2, positions=256)
    rig.add(
        "latent", queries=queries, latents=latents, rope=rope, norm=weight, plain=plain, q=q, kv=pages.layout,
        heads=heads, nope_dim=nope, rope_dim=ROPE, rank=RANK, interleaved=interleaved, query_stride=128,
        latent_stride=64, plain_stride=64, eps=eps, **({"growth": growth, "growth_length": 16} if growth else {}),
    )  # fmt: skip
    places = [(1, position) for position in range(30, 30 + rows)]
    rig.step(places)
    by_head = queries[:, : heads * (nope + ROPE)].reshape(rows, heads, -1)
    factors = np.float32([1 + (growth or 0) * np.log(1 + position // 16) for _, position in places])
    assert len(set(factors)) == (1 if growth is None else 2)
    by_head = by_head * factors[:, None, None]
    assert np.array_equal(plain[..., :nope], by_head[..., :nope].astype(BF16)) and not plain[..., nope:].any()
    turned = turn(by_head[..., nope:], angles[:, None], interleaved)
    assert not q[..., :RANK].any() and np.allclose(
        q[..., RANK : RANK + ROPE].astype("f4"), turned, rtol=0.01, atol=1e-6
    )
    low = latents[:, :RANK]
    normed = low / np.sqrt((low**2).mean(1, keepdims=True) + eps) * weight
    expected = np.concatenate([normed, turn(latents[:, RANK : RANK + ROPE], angles, interleaved)], axis=1)
    stored = pages.rows(1)
    error = np.abs(stored[30 : 30 + rows, : RANK + ROPE] - expected).max(1) / np.abs(expected).max(1)
    assert (error < {"bf16": 0.005, "int8": 0.005, "fp8": 0.04}[kv_format]).all()
    assert not stored[:30].any() and not stored[30 + rows :].any() and not pages.rows(0).any()


def test_where_nothing_turns_a_row_has_room_to_say_that_it_is_no_number(isa, kv_format) -> None:
    """Behind the latent, in keys and in queries, whatever was there before."""
    rows, rank, random = 3, 64, np.random.default_rng(5)
    queries, latents = (aligned((rows, width), np.float32) for width in (64, rank))
    queries[:], latents[:] = random.standard_normal(queries.shape), random.standard_normal(latents.shape)
    latents[1, 7] = np.inf
    weight, pages = aligned(rank, np.float32, fill=1), SharedPages(1, rank, 2, 256, kv_format)
    plain, q = aligned((rows, 3, 64), BF16), aligned((rows, 3, pages.key_dim), BF16, fill=np.nan)
    rig = Rig(isa, 2, rows=rows, sequences=1, positions=256)
    rig.add(
        "latent", queries=queries, latents=latents, rope=None, norm=weight, plain=plain, q=q, kv=pages.layout, heads=3,
        nope_dim=20, rope_dim=0, rank=rank, interleaved=False, query_stride=64, latent_stride=rank, plain_stride=64,
        eps=1e-3,
    )  # fmt: skip
    rig.step([(0, position) for position in range(rows)])
    assert not q[..., rank:].any() and np.array_equal(
        plain[..., :20], queries[:, :60].reshape(rows, 3, 20).astype(BF16)
    )
    stored = pages.rows(0)
    expected = latents[0] / np.sqrt((latents[0] ** 2).mean() + 1e-3)
    assert np.abs(stored[0, :rank] - expected).max() <= 0.07 * np.abs(expected).max()
    assert not stored[[0, 2], rank:].any() and not np.isfinite(stored[1]).all()


def test_rows_that_come_normed_and_turned_are_stored_as_they_are(isa, kv_format) -> None:
    """As those of a device do, which keeps the heads."""
    rows = 5
    latents = aligned((rows, 64), np.float32)
    latents[:] = np.random.default_rng(3).standard_normal(latents.shape)
    pages = SharedPages(2, RANK, ROPE, 256, kv_format)
    rig = Rig(isa, 2, rows=rows, sequences=2, positions=256)
    rig.add(
        "latent", queries=None, latents=latents, rope=None, norm=None, plain=None, q=None, kv=pages.layout,
        heads=0, nope_dim=20, rope_dim=ROPE, rank=RANK, interleaved=False, query_stride=0, latent_stride=64,
        plain_stride=64, eps=1e-6,
    )  # fmt: skip
    rig.step([(1, position) for position in range(30, 30 + rows)])
    expected, stored = latents[:, : RANK + ROPE], pages.rows(1)
    error = np.abs(stored[30 : 30 + rows, : RANK + ROPE] - expected).max(1) / np.abs(expected).max(1)
    assert (error < {"bf16": 0.005, "int8": 0.005, "fp8": 0.04}[kv_format]).all()
    assert not stored[:30].any() and not stored[30 + rows :].any() and not pages.rows(0).any()


def turn(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    cos, sin = np.cos(angles), np.sin(angles)
    both = [a * cos - b * sin, b * cos + a * sin]
    return np.stack(both, -1).reshape(x.shape) if interleaved else np.concatenate(both, -1)


@pytest.mark.parametrize("damage", [np.nan, np.inf, 3.4e38])
def test_a_damaged_row_spoils_those_that_see_it_alone(isa, kv_format, damage) -> None:
    """Even those in the same tile: its values, which they multiply by zero, must be numbers."""
    for column in (0, RANK + 3):
        latents = aligned((3, 64), np.float32)
        latents[:] = np.random.default_rng(2).standard_normal(latents.shape)
        latents[1, column] = damage
        pages = SharedPages(1, RANK, ROPE, 256, kv_format)
        rope, weight = aligned((3, ROPE), np.float32), aligned(RANK, np.float32, fill=1)
        rope[:, : ROPE // 2] = 1
        queries, plain = aligned((3, 64), np.float32), aligned((3, 1, 64), BF16)
        q, output = aligned((3, 1, pages.key_dim), BF16, fill=0.1), aligned((3, 64), BF16)
        queries[:] = 0.1
        states = aligned(pages.value_dim + STATE_EXTRA, np.float32)
        rig = Rig(isa, rows=3, sequences=1, positions=256)
        rig.add(
            "latent", queries=queries, latents=latents, rope=rope, norm=weight, plain=plain, q=q, kv=pages.layout,
            heads=1, nope_dim=20, rope_dim=ROPE, rank=RANK, interleaved=True, query_stride=64, latent_stride=64,
            plain_stride=64, eps=1e-6,
        )  # fmt: skip
        rig.add(
            "attention", q=q, output=output, states=states, sinks=None, kv=pages.layout, heads=1, kv_heads=1,
            head_dim=RANK, output_stride=64, window=0, scale=0.2,
        )  # fmt: skip
        rig.step([(0, 0), (0, 1), (0, 2)])
        finite = np.isfinite(output[:, :RANK].astype("f4"))
        assert finite[0].all() and not finite[1:].any(), column


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_every_head_has_a_matrix_of_its_own(isa, format, rows) -> None:
    heads, columns, inputs = 3, 70, 50
    random = np.random.default_rng(rows)
    matrices = [packed(format, random.standard_normal((columns, inputs)).astype(BF16)) for _ in range(heads)]
    weight = aligned(sum(blocks.nbytes for blocks, _ in matrices), np.uint8)
    weight[:] = np.concatenate([blocks.reshape(-1).view(np.uint8) for blocks, _ in matrices])
    x = rows_of(format, random.standard_normal((rows * heads, inputs)).astype(np.float32))
    output = aligned((rows, heads, 72), BF16, fill=-7)
    outputs = []
    for threads in (1, 3):
        rig = Rig(isa, threads, rows=rows)
        rig.add(
            "head_gemm", format=format_of(format), input=x, weight=weight, output=output, heads=heads, columns=columns,
            inputs=row_stride(inputs), input_stride=heads * x.strides[0], input_head_stride=x.strides[0],
            weight_head_stride=matrices[0][0].nbytes,
            output_stride=heads * 72, output_head_stride=72,
        )  # fmt: skip
        rig.run(rows)
        outputs.append(output.copy())
    assert outputs[0].tobytes() == outputs[1].tobytes() and (output[..., columns:] == -7).all()
    tiles = other_on_tiles(isa, format, rows)
    exact = dequantised_rows(format, x, inputs, tiles).reshape(rows, heads, inputs)
    for head, (_, matrix) in enumerate(matrices):
        wanted = exact[:, head] @ matrix.astype(np.float64).T
        bound = np.abs(exact[:, head]) @ np.abs(matrix.astype(np.float64)).T
        allowed = 2**-8 * np.abs(wanted) + 1e-5 * bound
        if tiles:
            allowed += np.abs(exact[:, head]) @ rounded_on_tiles(format, matrix).T
        assert (np.abs(output[:, head, :columns].astype(np.float64) - wanted) <= allowed).all()
