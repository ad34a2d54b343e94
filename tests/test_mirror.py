"""Rings of recent keys and values: what they say they hold is there, through gaps, rewinds and releases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from hybrid.gpu.attention import State, attend, attend_whole, finish, join  # noqa: E402
from hybrid.gpu.mirror import KvMirror, KvRings, Run, extents_of, rings_of, seen_places  # noqa: E402

CPU = torch.device("cpu")
CAPACITY, SEQUENCES = 16, 3


def new_rings() -> KvRings:
    return KvRings(SEQUENCES, 2, CAPACITY, 24, CPU)


steps = st.lists(
    st.tuples(st.integers(0, SEQUENCES - 1), st.integers(0, 40), st.integers(1, CAPACITY), st.booleans()), max_size=25
)


@settings(max_examples=150)
@given(steps, st.sampled_from([None, 1, 5, 30]))
def test_rows_see_what_the_mirror_says_and_nothing_else(plan, window) -> None:
    """Every token is written with a number of its own, and read back through what is seen."""
    mirror, rings = KvMirror(SEQUENCES, CAPACITY), new_rings()
    ends, serial = [0] * SEQUENCES, 0
    written: list[dict[int, int]] = [{} for _ in range(SEQUENCES)]
    for sequence, jump, rows, follow in plan:
        position = ends[sequence] if follow else jump
        start, end = mirror.extend(sequence, position, rows)
        assert end == position + rows and start <= position and end - start <= CAPACITY
        tokens = torch.arange(serial + 1, serial + rows + 1)
        serial += rows
        heads = tokens.float()[:, None, None].expand(rows, 2, 24)
        places = (position + torch.arange(rows)) % CAPACITY
        rings.write(torch.full((rows,), sequence), places, heads, -heads)
        written[sequence] |= {position + i: int(tokens[i]) for i in range(rows)}
        ends[sequence] = end
        keys = min(CAPACITY, end)
        k, v = rings.read(rings_of([sequence], CPU), keys)
        extents = extents_of([Run(sequence, 0, rows, position, start, end)], CPU)
        seen = seen_places(extents, rows, keys, CAPACITY, window)[0]
        for row in range(rows):
            last = position + row
            first = start if window is None else max(start, last - window + 1)
            wanted = sorted(written[sequence][p] for p in range(first, last + 1))
            assert sorted(k[0, 0, seen[row], 0].int().tolist()) == wanted
            assert sorted((-v[0, 1, seen[row], 5]).int().tolist()) == wanted


@settings(max_examples=150)
@given(steps)
def test_what_is_missing_is_refilled_and_then_nothing_is(plan) -> None:
    """Every place holds the position that it should, wherever a sequence goes on."""
    mirror, held = KvMirror(SEQUENCES, CAPACITY), np.full((SEQUENCES, CAPACITY), -1)
    ends = [0] * SEQUENCES
    for sequence, jump, rows, follow in plan:
        position = ends[sequence] if follow else jump
        start, end = mirror.missing(sequence, position, rows)
        if start < end:
            held[sequence, np.arange(start, end) % CAPACITY] = np.arange(start, end)
            mirror.refill(sequence, start, end)
        seen = np.arange(position, position + rows)
        held[sequence, seen % CAPACITY] = seen
        first, ends[sequence] = mirror.extend(sequence, position, rows)
        assert first == max(0, position + rows - CAPACITY)
        mirrored = np.arange(first, ends[sequence])
        assert np.array_equal(held[sequence, mirrored % CAPACITY], mirrored)


def test_a_sequence_that_goes_on_is_refilled_with_nothing() -> None:
    mirror = KvMirror(SEQUENCES, CAPACITY)
    for position in range(0, 40, 4):
        start, end = mirror.missing(1, position, 4)
        assert start == end
        mirror.extend(1, position, 4)


def test_other_sequences_are_left_alone() -> None:
    rings = new_rings()
    rings.write(torch.tensor([2]), torch.tensor([3]), torch.ones(1, 2, 24), torch.ones(1, 2, 24))
    for sequence in (0, 1):
        assert not any(part.any() for part in rings.read(rings_of([sequence], CPU), CAPACITY))
    keys, _ = rings.read(rings_of([2, 0], CPU), CAPACITY)  # not in order: a copy
    assert keys[0, :, 3].all() and not keys[1].any()
    assert rings.nbytes == 2 * SEQUENCES * CAPACITY * 2 * 24 * 2


def test_a_released_sequence_begins_anew() -> None:
    mirror = KvMirror(SEQUENCES, CAPACITY)
    mirror.extend(0, 0, 10)
    mirror.forget(0)
    assert mirror.extend(0, 4, 2) == (4, 6)  # what lay before 4 is another sequence's


def random_attention(heads: int = 6, kv_heads: int = 2, keys: int = 300, rows: int = 5):
    torch.manual_seed(0)
    q = torch.randn(2, rows, heads, 24).bfloat16()
    k, v = (torch.randn(2, kv_heads, keys, 24).bfloat16() for _ in range(2))
    seen = torch.rand(2, rows, keys) < 0.5
    seen[..., 0] = True
    return q, k, v, seen


def exact(q, k, v, seen, sinks) -> np.ndarray:
    """In double precision, by the definition."""
    group = q.shape[2] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("brhd,bhkd->brhk", q.double(), k) * 0.2
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    if sinks is not None:
        column = sinks.double().expand(*scores.shape[:3])[..., None]
        scores, v = torch.cat([scores, column], -1), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
    return torch.einsum("brhk,bhkd->brhd", scores.softmax(-1), v).numpy()


@pytest.mark.parametrize("sinks", [None, torch.linspace(-20, 20, 6)], ids=["plain", "sinks"])
@pytest.mark.parametrize("split", [0, 1, 150, 299, 300])
def test_any_split_of_the_keys_joins_to_the_whole(split, sinks) -> None:
    q, k, v, seen = random_attention()
    parts = [(k[:, :, part], v[:, :, part], seen[..., part]) for part in (slice(split), slice(split, None))]
    states = [attend(q, *part, 0.2) for part in parts if part[0].shape[2]]
    whole = states[0] if len(states) == 1 else join(*states)
    assert np.abs(finish(whole, sinks).numpy() - exact(q, k, v, seen, sinks)).max() < 2**-7
    assert finish(whole, sinks).shape == (2, 5, 6, 24)


def test_parts_that_fit_the_workspace_join_to_the_whole(monkeypatch) -> None:
    q, k, v, seen = random_attention(keys=1000)
    whole = finish(attend(q, k, v, seen, 0.2), None)
    monkeypatch.setattr("hybrid.gpu.attention.SCORES", 1)
    parts = finish(attend(q, k, v, seen, 0.2), None)
    assert not torch.equal(parts, whole) and (parts - whole).abs().max() < 2**-7


def test_a_row_that_sees_nothing_adds_nothing() -> None:
    q, k, v, seen = random_attention()
    nothing = attend(q, k, v, torch.zeros_like(seen), 0.2)
    assert (nothing.top == -torch.inf).all() and not nothing.total.any() and not nothing.values.any()
    some = attend(q, k, v, seen, 0.2)
    for joined in (join(some, nothing), join(nothing, some)):
        assert all(torch.equal(getattr(joined, name), getattr(some, name)) for name in ("values", "top", "total"))
    empty = join(nothing, nothing)
    assert isinstance(empty, State) and not empty.total.any()


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_torchs_own_attention_is_the_same(kv_heads) -> None:
    q, k, v, seen = random_attention(kv_heads=kv_heads)
    assert np.abs(attend_whole(q, k, v, seen, 0.2).numpy() - exact(q, k, v, seen, None)).max() < 2**-6
