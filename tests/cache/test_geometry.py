"""Where experts may lie, and what sizes a cache can have."""

from __future__ import annotations

from collections import Counter

import pytest

from gpu_cache.clock import CopyClock
from gpu_cache.errors import CacheError
from gpu_cache.geometry import MAPPINGS, Geometry, auto_geometry


def test_modulo_takes_layers_in_turn() -> None:
    geometry = Geometry(3, 2, 4, 8)
    assert geometry.slots == 6
    assert [geometry.index_of(layer * 8 + 5) for layer in range(4)] == [0, 1, 2, 0]


def test_modulo_spreads_a_layer_when_there_are_more_indexes() -> None:
    geometry = Geometry(9, 2, 4, 8)  # two indexes for each layer, one left over
    assert [geometry.index_of(8 + expert) for expert in range(4)] == [1, 5, 1, 5]
    assert {geometry.index_of(key) for key in range(32)} == set(range(8))


def test_prefix_caches_the_first_layers_only() -> None:
    geometry = Geometry(2, 4, 4, 8, "prefix")
    assert [geometry.index_of(layer * 8) for layer in range(4)] == [0, 1, -1, -1]


def test_hash_is_even_and_the_same_everywhere() -> None:
    geometry = Geometry(8, 16, 48, 128, "hash")
    counts = Counter(geometry.index_of(key) for key in range(48 * 128))
    assert set(counts) == set(range(8))
    mean = 48 * 128 / 8
    assert max(abs(n - mean) for n in counts.values()) < 4 * mean**0.5  # four standard deviations of an even draw
    assert [geometry.index_of(key) for key in range(8)] == [7, 1, 6, 5, 2, 2, 0, 7]
    assert Geometry(10, 1, 4, 8, "hash").index_of(0) == 0xE220A8397B1DCDAF % 10  # SplitMix64's first number from seed 0


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_index_is_within_the_cache(mapping: str) -> None:
    for nblocks in (1, 2, 5):
        geometry = Geometry(nblocks, 3, 5, 7, mapping)
        indexes = {geometry.index_of(key) for key in range(35)}
        assert indexes <= set(range(-1, nblocks))
        assert (-1 in indexes) == (mapping == "prefix" and nblocks < 5)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_spread_counts_the_experts_of_a_layer_in_an_index(mapping: str) -> None:
    for nblocks in (1, 2, 5):
        geometry = Geometry(nblocks, 3, 5, 7, mapping)
        assert geometry.indexes().tolist() == [geometry.index_of(key) for key in range(35)]
        counts = Counter((geometry.index_of(key), key // 7) for key in range(35))
        assert geometry.spread().tolist() == [[counts[index, layer] for layer in range(5)] for index in range(nblocks)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 4), r"indexes \(nblocks\) of the cache: 0, must be 1 to 32"),
        ((-1, 4), r"indexes \(nblocks\) of the cache: -1"),
        ((33, 1), r"indexes \(nblocks\) of the cache: 33, must be 1 to 32"),
        ((4, 0), r"ways \(nways\) of the cache: 0, must be 1 to 32"),
        ((1, 33), r"ways \(nways\) of the cache: 33"),
        ((5, 8), r"40 slots, the model has 32 experts .*: at most 4 indexes of 8 ways, or 6 ways in 5 indexes"),
    ],
)
def test_sizes_that_no_cache_can_have(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(CacheError, match=message) as error:
        Geometry(*sizes, 4, 8)
    assert "\n" not in str(error.value)


def test_other_bad_values() -> None:
    with pytest.raises(CacheError, match="mapping 'modulus' is unknown: use one of modulo, prefix, hash"):
        Geometry(1, 1, 4, 8, "modulus")
    with pytest.raises(CacheError, match=r"indexes \(nblocks\) of the cache: 5, must be 1 to 4"):
        Geometry(5, 1, 4, 8, "prefix")
    with pytest.raises(CacheError, match="experts of the cache: 0, must be at least 1"):
        Geometry(1, 1, 4, 0)


@pytest.mark.parametrize(
    ("fit", "nways", "expected"),
    [
        (1000, None, (4, 16)),  # all experts
        (50, None, (4, 12)),
        (32, None, (4, 8)),
        (31, None, (3, 10)),  # layers share indexes before those get small
        (5, None, (1, 5)),
        (1, None, (1, 1)),
        (50, 4, (12, 4)),  # three indexes a layer
        (47, 5, (8, 5)),
        (12, 5, (2, 5)),
    ],
)
def test_auto_fills_what_fits(fit: int, nways: int | None, expected: tuple[int, int]) -> None:
    geometry = auto_geometry(fit, 4, 16, nways)
    assert (geometry.nblocks, geometry.nways) == expected
    assert geometry.slots <= fit


def test_auto_says_when_nothing_fits() -> None:
    with pytest.raises(CacheError, match="1 slots are wanted for one index, 0 fit the device"):
        auto_geometry(0, 4, 16)
    with pytest.raises(CacheError, match="8 slots are wanted for one index, 7 fit the device"):
        auto_geometry(7, 4, 16, 8)


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_a_copy_ends_before_the_lookup_after_its_delay(delay: int) -> None:
    clock = CopyClock(delay)
    assert not clock.due()
    clock.issue(7)
    clock.issue(3)
    assert not any(clock.due() for _ in range(delay))
    clock.issue(5)
    assert [*clock.due()] == [7, 3] + [5] * (delay == 0)
    assert [[*clock.due()] for _ in range(delay)] == [[]] * max(0, delay - 1) + [[5]] * (delay > 0)
