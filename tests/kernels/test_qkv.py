"""Queries, keys and values are normed, turned and laid out; what other slots and tokens hold is left alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from kernel_reference import FP32, Near, assert_near, rms_norm, rotate
from kv_pages import KvPages, quantised
from rig import BF16, Rig, aligned

from hybrid.config import KV_FORMATS
from hybrid.formats.rows import row_stride

EPS = 1e-6
PLACES = [(0, 0), (0, 1), (2, 15), (2, 16), (2, 17), (1, 255), (3, 256)]  # (slot, position) of each row


def run(isa, x, pages: KvPages, heads, table, norms, *, rope_dim, interleaved=False, threads=1, **more) -> np.ndarray:
    """The queries [rows, heads, key_dim] of x [rows, (heads + 2 kv_heads) * head_dim]; the rest goes to the pages."""
    rows, width = x.shape
    inputs = aligned((rows, row_stride(width)), np.float32)
    inputs[:, :width] = x
    q = aligned((rows, heads, pages.key_dim), BF16)
    rig = Rig(isa, threads, positions=pages.tokens)
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
        **more,
    )
    rig.step(PLACES)
    return q


def stored(near: Near, format: str) -> Near:
    """How far a stored key may be from what was to be stored: half the distance of two codes, and fp32's part in it."""
    if format == "bf16":
        return near.as_bf16()
    largest = (np.abs(near.value) + near.bound).max(-1, keepdims=True)
    if format == "int8":
        rounding = largest / 127 / 2
    else:
        rounding = np.maximum(2.0**-4 * (np.abs(near.value) + near.bound), largest / 448 * 2.0**-10)
    return Near(near.value, near.bound + rounding + 4 * FP32 * largest)


def assert_stored(pages: KvPages, which: int, slot: int, position: int, rows: np.ndarray) -> None:
    """Rows [kv_heads, head_dim] lie there, bit for bit as quantised by the definition; which: 0 keys, 1 values."""
    codes, scales = quantised(rows, pages.format)
    found = pages.codes(slot)[which][:, position]
    assert np.array_equal(found[:, : rows.shape[1]].view(np.uint8), codes.view(np.uint8))
    assert not found[:, rows.shape[1] :].any()
    if pages.format != "bf16":
        assert np.array_equal(pages.scales(slot)[which][:, position], scales)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (3, 1, 40), (2, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rope", ["none", "half-split", "interleaved", "partial"])
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_heads_are_normed_turned_and_stored(isa, kv_format, heads, kv_heads, head_dim, normed, rope) -> None:
    random = np.random.default_rng(head_dim)
    rows, rope_dim = len(PLACES), {"none": 0, "partial": head_dim // 2}.get(rope, head_dim)
    x = random.standard_normal((rows, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    angles = random.uniform(-3, 3, (rows, rope_dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    norms = [random.standard_normal(head_dim).astype(np.float32) for _ in "qk"] if normed else None
    pages = KvPages(slots=4, heads=kv_heads, head_dim=head_dim, tokens=512, format=kv_format)
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
            expected[name] = near
        assert_near(q[row, :, :head_dim], expected["q"].as_bf16())
        assert_near(pages.keys(slot)[:, position, :head_dim], stored(expected["k"], kv_format))
        assert_stored(pages, 1, slot, position, parts["v"])
        if not norms and not rope_dim:
            assert_stored(pages, 0, slot, position, parts["k"])
    assert not q[:, :, head_dim:].any()
    assert pages.used() == len(set(PLACES))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_one_norm_may_span_all_heads_or_come_behind_rope(isa, kv_format) -> None:
    random, rows, heads, kv_heads, dim = np.random.default_rng(3), len(PLACES), 6, 2, 24
    x = random.standard_normal((rows, (heads + 2 * kv_heads) * dim)).astype(np.float32)
    angles = random.uniform(-3, 3, (rows, dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    split = x.reshape(rows, -1, dim)
    parts = split[:, :heads], split[:, heads : heads + kv_heads]
    for whole in (True, False):
        norms = [random.standard_normal(part[0].size if whole else dim).astype(np.float32) for part in parts]
        pages = KvPages(slots=4, heads=kv_heads, head_dim=dim, tokens=512, format=kv_format)
        flags = {"norm_whole": whole, "norm_last": not whole}
        q = run(isa, x, pages, heads, table, norms, rope_dim=dim, threads=2, **flags)
        for row, (slot, position) in enumerate(PLACES):
            expected = []
            for part, weight in zip(parts, norms, strict=True):
                own = part[row]
                if whole:
                    near = rms_norm(own.reshape(-1), weight, EPS)
                    near = rotate(
                        Near(near.value.reshape(own.shape), near.bound.reshape(own.shape)), table[row], dim, False
                    )
                else:
                    near = rotate(Near(own.astype(np.float64), np.zeros(own.shape)), table[row], dim, False)
                    normed = rms_norm(near.value, weight, EPS)
                    near = Near(normed.value, normed.bound + 8 * FP32 * np.abs(weight) * np.abs(normed.value).max())
                expected.append(near)
            assert_near(q[row, :, :dim], expected[0].as_bf16())
            assert_near(pages.keys(slot)[:, position, :dim], stored(expected[1], kv_format))


def test_heads_may_have_layer_norms_with_weights_of_their_own(isa) -> None:
    random, rows, heads, kv_heads, dim = np.random.default_rng(8), len(PLACES), 6, 2, 24
    x = random.standard_normal((rows, heads + 2 * kv_heads, dim)).astype(np.float32) + 0.5
    norms = [random.standard_normal((count, dim)).astype(np.float32) for count in (heads, kv_heads)]
    angles = random.uniform(-3, 3, (rows, dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    pages = KvPages(4, kv_heads, dim, 512)
    q = run(isa, x.reshape(rows, -1), pages, heads, table, norms, rope_dim=dim, threads=2, norm_apart=True)
    centred = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    for row, (slot, position) in enumerate(PLACES):
        parts = centred[row, :heads], centred[row, heads : heads + kv_heads]
        found = q[row, :, :dim], pages.keys(slot)[:, position, :dim]
        for part, weight, own in zip(parts, norms, found, strict=True):
            near = rms_norm(part, weight, EPS)
            near = rotate(Near(near.value, near.bound + 16 * FP32 * np.abs(weight)), table[row], dim, False)
            assert_near(own, near.as_bf16())


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(24, 20), (192, 128), (40, 64)])
def test_values_may_be_of_another_size_than_keys(isa, kv_format, head_dim, value_dim) -> None:
    random, rows, heads, kv_heads = np.random.default_rng(6), len(PLACES), 4, 2
    keys, values = (random.standard_normal((rows, kv_heads, dim)).astype(np.float32) for dim in (head_dim, value_dim))
    queries = random.standard_normal((rows, heads, head_dim)).astype(np.float32)
    keys[3, 1, 0], values[3, 1, -1] = 1.0, np.inf  # the key tells that its value is damaged
    x = np.concatenate([part.reshape(rows, -1) for part in (queries, keys, values)], axis=1)
    pages = KvPages(4, kv_heads, head_dim, 512, kv_format, value_dim)
    q = run(isa, x, pages, heads, None, None, rope_dim=0, threads=2, value_head_dim=value_dim)
    assert np.array_equal(q[..., :head_dim], queries.astype(BF16)) and not q[..., head_dim:].any()
    for row, (slot, position) in enumerate(PLACES):
        whole = slice(0, 1 if row == 3 else kv_heads)
        for which, part in ((0, keys), (1, values)):
            codes, scales = quantised(part[row, whole], kv_format)
            found = pages.codes(slot)[which][whole, position]
            assert found[:, : part.shape[2]].tobytes() == codes.tobytes() and not found[:, part.shape[2] :].any()
            if kv_format != "bf16":
                assert np.array_equal(pages.scales(slot)[which][whole, position], scales)
    slot, position = PLACES[3]
    assert np.isnan(pages.keys(slot)[1, position].astype(np.float32)).any()
    assert not pages.codes(slot)[1][1, position].any()


def test_late_queries_grow_by_steps_of_a_logarithm(isa) -> None:
    """Keys and values do not."""
    random, heads, kv_heads, dim = np.random.default_rng(5), 3, 1, 40
    x = random.standard_normal((len(PLACES), (heads + 2 * kv_heads) * dim)).astype(np.float32)
    found = []
    for growth in ({}, {"growth": 0.3, "growth_length": 16}):
        pages = KvPages(slots=4, heads=kv_heads, head_dim=dim, tokens=512, format="bf16")
        found.append((run(isa, x, pages, heads, None, None, rope_dim=0, **growth), pages))
    (plain, before), (grown, after) = found
    factors = np.float32([1 + 0.3 * np.log(1 + position // 16) for _, position in PLACES])
    assert factors[0] == factors[2] == 1 and len(set(factors)) == 4
    exact = x.reshape(len(PLACES), -1, dim)[:, :heads] * factors[:, None, None]
    assert np.array_equal(grown[..., :dim], exact.astype(BF16))
    assert np.array_equal(plain[factors == 1], grown[factors == 1])
    assert all(np.array_equal(before.keys(slot), after.keys(slot)) for slot in range(4))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("shared", [False, True])
def test_values_are_normed_and_may_be_the_keys_before_norm_and_rope(isa, kv_format, shared) -> None:
    random, rows, heads, kv_heads, dim = np.random.default_rng(4), len(PLACES), 6, 2, 40
    x = random.standard_normal((rows, (heads + (1 if shared else 2) * kv_heads) * dim)).astype(np.float32)
    angles = random.uniform(-3, 3, (rows, dim // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    norms = [random.standard_normal(dim).astype(np.float32) for _ in "qk"]
    pages = KvPages(slots=4, heads=kv_heads, head_dim=dim, tokens=512, format=kv_format)
    flags = {"norm_values": True, "keys_are_values": shared}
    run(isa, x, pages, heads, table, norms, rope_dim=dim, threads=2, **flags)
    split = x.reshape(rows, -1, dim)
    for row, (slot, position) in enumerate(PLACES):
        keys = rotate(rms_norm(split[row, heads : heads + kv_heads], norms[1], EPS), table[row], dim, False)
        values = rms_norm(split[row, -kv_heads:], np.ones(dim, np.float32), EPS)
        assert_near(pages.keys(slot)[:, position, :dim], stored(keys, kv_format))
        assert_near(pages.values(slot)[:, position, :dim], stored(values, kv_format))


def test_a_value_whose_norm_overflows_is_told_by_its_key(isa) -> None:
    """Its square is no number: what it becomes must not be zero in silence."""
    dim, x = 64, np.ones((len(PLACES), 3 * 64), np.float32)
    x[2, 128:] = 1e20
    pages = KvPages(slots=4, heads=1, head_dim=dim, tokens=512)
    run(isa, x, pages, 1, None, None, rope_dim=0, norm_values=True)
    slot, position = PLACES[2]
    assert np.isnan(pages.keys(slot)[0, position].astype(np.float32)).any()
    assert not pages.values(slot)[0, position].astype(np.float32).any()
    assert not np.isnan(pages.keys(PLACES[0][0])[0, PLACES[0][1]].astype(np.float32)).any()


def fp8_values() -> np.ndarray:
    """Every finite e4m3 value, those halfway between two and those just beside: [rows, 128], 448 in each row."""
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middles = (values[1:] + values[:-1]) / 2
    steps = [np.nextafter(middles, np.float32(end)) for end in (0, np.inf)]
    cases = np.concatenate([values, middles, *steps])
    cases = np.resize(np.concatenate([cases, -cases]), (len(PLACES), 2, 127))
    return np.concatenate([cases, np.full((len(PLACES), 2, 1), 448)], axis=-1).astype(np.float32)


@pytest.mark.parametrize("kv_format", ["int8", "fp8"])
@pytest.mark.parametrize("size", [1, 1e-30, 1e-39, 1e30, 0])
def test_codes_are_those_nearest(isa, kv_format, size) -> None:
    """Ties, subnormal codes, and rows whose factor would not be finite."""
    both = fp8_values() * np.float32(size)  # a KV head for keys, one for values
    pages = KvPages(slots=4, heads=1, head_dim=128, tokens=512, format=kv_format)
    x = np.concatenate([both[:, :1], both], axis=1).reshape(len(PLACES), -1)
    run(isa, x, pages, 1, None, None, rope_dim=0)
    for row, (slot, position) in enumerate(PLACES):
        for which in (0, 1):
            if 0 < size < 1e-38:
                assert not pages.codes(slot)[which][:, position].any()
            else:
                assert_stored(pages, which, slot, position, both[row, which : which + 1])


@pytest.mark.parametrize("dim", [2, 24, 128])
@pytest.mark.parametrize("factor", [1.0, 1.3465735902799727])
def test_rope_tables_are_cosines_and_sines_of_fp32_angles(isa, dim, factor) -> None:
    frequencies = (10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
    positions = [0, 1, 255, 40000, 99999]
    table = aligned((len(positions), dim), np.float32)
    rig = Rig(isa, 2, sequences=8, positions=100000)
    rig.add("rope_table", inverse_frequencies=frequencies, table=table, dim=dim, factor=factor)
    rig.step(list(enumerate(positions)))
    angles = (np.array(positions, np.float32)[:, None] * frequencies).astype(np.float64)
    expected = factor * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert_near(table, Near(expected, 3 * FP32 * np.abs(expected)))


def test_rope_tables_of_long_sequences_have_frequencies_of_their_own(isa) -> None:
    dim, positions, lengths = 24, [0, 7, 7, 300], np.array([1, 64, 65, 4000], np.int32)
    short = (10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
    long = short / np.float32(3)
    tables = [aligned((4, dim), np.float32) for _ in range(3)]
    more = {"long_frequencies": long, "lengths": lengths, "long_above": 64, "long_factor": 1.5}
    for table, frequencies, factor, others in [
        (tables[0], short, 1.2, more), (tables[1], short, 1.2, {}), (tables[2], long, 1.5, {}),
    ]:  # fmt: skip
        rig = Rig(isa, 2, sequences=8, positions=1000)
        rig.add("rope_table", inverse_frequencies=frequencies, table=table, dim=dim, factor=factor, **others)
        rig.step(list(enumerate(positions)))
    assert np.array_equal(tables[0], np.where((lengths > 64)[:, None], tables[2], tables[1]))
