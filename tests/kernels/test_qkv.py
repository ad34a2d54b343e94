"""Queries, keys and values are normed, turned and laid out; what other slots and tokens hold is left alone."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_reference import FP32, Near, assert_near, rms_norm, rotate
from kv_pages import KvPages
from rig import BF16, Rig, aligned

from hybrid.program import row_stride

EPS = 1e-6
PLACES = [(0, 0), (0, 1), (2, 15), (2, 16), (2, 17), (1, 255), (3, 256)]  # (slot, position) of each row


def run(isa, x, pages: KvPages, heads, table, norms, *, rope_dim, interleaved=False, threads=1) -> np.ndarray:
    """The queries [rows, heads, key_dim] of x [rows, (heads + 2 kv_heads) * head_dim]; the rest goes to the pages."""
    rows, width = x.shape
    inputs = aligned((rows, row_stride(width)), np.float32)
    inputs[:, :width] = x
    q = aligned((rows, heads, pages.key_dim), BF16)
    rig = Rig(isa, threads)
    rig.add(
        "qkv",
        qkv=inputs,
        rope=table,
        q_norm=norms and norms[0],
        k_norm=norms and norms[1],
        q=q,
        kv=pages.layout,
        heads=heads,
        kv_heads=pages.heads,
        head_dim=pages.head_dim,
        rope_dim=rope_dim,
        interleaved=interleaved,
        qkv_stride=row_stride(width),
        eps=EPS,
    )
    rig.step(PLACES)
    return q


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (3, 1, 40), (2, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rope", ["none", "half-split", "interleaved", "partial"])
def test_heads_are_normed_turned_and_stored(isa, heads, kv_heads, head_dim, normed, rope) -> None:
    random = np.random.default_rng(head_dim)
    rows, rope_dim = len(PLACES), {"none": 0, "partial": head_dim // 2}.get(rope, head_dim)
    x = random.standard_normal((rows, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    angles = random.uniform(-3, 3, (rows, rope_dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    norms = [random.standard_normal(head_dim).astype(np.float32) for _ in "qk"] if normed else None
    pages = KvPages(slots=4, heads=kv_heads, head_dim=head_dim, tokens=512)
    q = run(isa, x, pages, heads, table, norms, rope_dim=rope_dim, interleaved=rope == "interleaved", threads=2)

    split = x.reshape(rows, -1, head_dim)
    for row, (slot, position) in enumerate(PLACES):
        parts = {"q": split[row, :heads], "k": split[row, heads : heads + kv_heads], "v": split[row, -kv_heads:]}
        expected = {}
        for index, name in enumerate("qk"):
            part = parts[name]
            near = Near(part.astype(np.float64), np.zeros(part.shape))
            if norms:
                near = rms_norm(part, norms[index], EPS)
            if rope_dim:
                near = rotate(near, table[row], rope_dim, rope == "interleaved")
            expected[name] = near.as_bf16()
        assert_near(q[row, :, :head_dim], expected["q"])
        assert_near(pages.keys(slot)[:, position, :head_dim], expected["k"])
        assert np.array_equal(pages.values(slot)[:, position, :head_dim], parts["v"].astype(BF16))
    assert not q[:, :, head_dim:].any()
    assert pages.used() == len(set(PLACES))


@pytest.mark.parametrize("dim", [2, 24, 128])
@pytest.mark.parametrize("factor", [1.0, 1.3465735902799727])
def test_rope_tables_are_cosines_and_sines_of_fp32_angles(isa, dim, factor) -> None:
    frequencies = (10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
    positions = [0, 1, 255, 40000, 99999]
    table = aligned((len(positions), dim), np.float32)
    rig = Rig(isa, 2, slots=8, positions=100000)
    rig.add("rope_table", inverse_frequencies=frequencies, table=table, dim=dim, factor=factor)
    rig.step(list(enumerate(positions)))
    angles = (np.array(positions, np.float32)[:, None] * frequencies).astype(np.float64)
    expected = factor * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert_near(table, Near(expected, 3 * FP32 * np.abs(expected)))
