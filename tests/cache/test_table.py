"""The table keeps its promises whatever is done to it, in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from walk import Walk, storm

from gpu_cache.admission import ADMISSIONS
from gpu_cache.errors import CacheError
from gpu_cache.geometry import MAPPINGS, Geometry
from gpu_cache.policies import POLICIES
from gpu_cache.table import Fill, Lookup, Table

STORMS, OPERATIONS = 250, 4000  # a million random steps of a table

geometries = st.builds(
    Geometry,
    nblocks=st.integers(1, 3),
    nways=st.integers(1, 5),
    layers=st.integers(3, 4),
    experts=st.integers(5, 8),
    mapping=st.sampled_from(MAPPINGS),
)
walks = st.builds(
    Walk,
    geometry=geometries,
    policy=st.sampled_from(sorted(POLICIES)),
    admission=st.sampled_from(sorted(ADMISSIONS)),
    quota=st.none() | st.integers(0, 4),
    seed=st.integers(0, 3),
)


@settings(max_examples=STORMS)
@given(walk=walks, seed=st.integers(0, 2**32))
def test_a_million_random_steps(walk: Walk, seed: int) -> None:
    storm(walk, OPERATIONS, seed)
    walk.finish()


class TableMachine(RuleBasedStateMachine):
    """The same operations, chosen by hypothesis one by one, so that a failure shrinks to the shortest that shows it."""

    @initialize(walk=walks)
    def begin(self, walk: Walk) -> None:
        self.walk = walk

    @rule(data=st.data())
    def lookup(self, data: st.DataObject) -> None:
        self.walk.lookup(*self._group(data))

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        self.walk.prefetch(*self._group(data))

    @rule()
    def admit(self) -> None:
        self.walk.admit()

    @rule(number=st.integers(0, 20))
    def publish(self, number: int) -> None:
        self.walk.publish(number)

    @rule(number=st.integers(0, 20))
    def abandon(self, number: int) -> None:
        self.walk.abandon(number)

    @rule()
    def release(self) -> None:
        self.walk.release()

    @rule()
    def begin_step(self) -> None:
        self.walk.begin_step()

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "walk"):
            self.walk.finish()

    def _group(self, data: st.DataObject) -> tuple[int, list[int]]:
        geometry = self.walk.geometry
        layer = data.draw(st.integers(0, geometry.layers - 1))
        return layer, data.draw(st.lists(st.integers(0, geometry.experts - 1), min_size=1, max_size=4, unique=True))


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=60, stateful_step_count=40)


def small_table(**choices: object) -> Table:
    """One layer of 4 experts, 2 slots in one index."""
    return Table(Geometry(1, 2, 1, 4), **choices)  # type: ignore[arg-type]


def fill(table: Table, experts: list[int]) -> list[Fill]:
    """Look up, admit and publish at once."""
    table.lookup(0, experts)
    fills = table.admit()
    table.release()
    for one in fills:
        table.publish(one.slot)
    return fills


def test_the_life_of_a_slot() -> None:
    table = small_table()
    table.begin_step(0)
    assert table.lookup(0, [2, 0], [0.6, 0.4]) == Lookup([], [], [2, 0])
    assert table.admit() == [Fill(0, 2, None), Fill(1, 0, None)]  # lowest way first
    assert table.admit() == []  # once for each lookup
    assert table.lookup(0, [0, 2, 3]) == Lookup([], [0, 2], [3])  # nobody waits for a copy
    assert table.admit() == []  # no slot to give: both are loading
    table.publish(1)
    assert table.lookup(0, [0, 2, 3]) == Lookup([(0, 1)], [2], [3])
    assert table.admit() == []  # pinned and loading
    table.release()
    table.abandon(0)
    assert table.lookup(0, [2]) == Lookup([], [], [2])
    assert table.admit() == [Fill(0, 2, None)]
    assert table.resident() == [0]
    assert [int(n[0]) for n in table.counts] == [9, 1, 3, 5, 3, 0]


def test_what_a_lookup_hits_is_not_evicted_by_what_it_misses() -> None:
    table = small_table()
    fill(table, [0])
    fill(table, [1])  # 0 is the least recently used
    assert table.lookup(0, [2, 0]) == Lookup([(0, 0)], [], [2])
    assert table.admit() == [Fill(1, 2, 1)]


def test_misses_beyond_the_ways_are_left_out() -> None:
    table = small_table()
    assert [f.key for f in fill(table, [0, 1, 2, 3])] == [0, 1]
    assert int(table.counts.misses[0]) == 4


def test_the_quota_is_of_a_step_and_prefetch_draws_on_it() -> None:
    table = Table(Geometry(2, 4, 2, 4), quota=3)
    table.begin_step(0)
    table.lookup(0, [0, 1])
    assert len(table.admit()) == 2
    assert [f.key for f in table.prefetch(1, [0, 1])] == [4]
    table.lookup(0, [2])
    assert table.admit() == []
    table.begin_step(1)
    table.lookup(0, [2])
    assert len(table.admit()) == 1


def test_prefetch_spares_what_it_was_asked_for() -> None:
    table = small_table()
    fill(table, [0])
    fill(table, [1])
    assert table.prefetch(0, [0, 3]) == [Fill(1, 3, 1)]  # LRU alone would have evicted 0
    table.publish(1)
    assert table.prefetch(0, [0, 3]) == []
    assert table.lookup(0, [0, 3]).hits == [(0, 0), (3, 1)]


def test_preload_is_ready_at_once_and_not_counted() -> None:
    table = small_table()
    assert table.preload([3, 3, 1, 2]) == [Fill(0, 3, None), Fill(1, 1, None)]
    assert table.resident() == [3, 1]
    assert table.lookup(0, [1]).hits == [(1, 1)]
    table.check_integrity()
    assert int(table.counts.fills.sum()) == 0
    with pytest.raises(CacheError, match="expert 4 is not of this model: it has 4"):
        table.preload([4])


def test_what_is_not_cacheable_is_never_filled() -> None:
    table = Table(Geometry(1, 2, 2, 4, "prefix"))
    assert table.lookup(1, [0]) == Lookup([], [], [0])
    assert table.admit() == [] == table.prefetch(1, [0]) == table.preload([5])


@pytest.mark.parametrize("act", [Table.publish, Table.abandon])
def test_only_a_loading_slot_can_be_published_or_abandoned(act: object) -> None:
    table = small_table()
    table.preload([2])
    for slot in (0, 1):  # ready, empty
        with pytest.raises(CacheError, match=f"slot {slot} is not loading"):
            act(table, slot)  # type: ignore[operator]


def test_names_and_numbers_are_checked() -> None:
    with pytest.raises(CacheError, match="policy 'MRU' is unknown: use one of .*LRU"):
        small_table(policy="MRU")
    with pytest.raises(CacheError, match="admission 'never' is unknown: use one of always"):
        small_table(admission="never")
    with pytest.raises(CacheError, match="break-even admission needs costs"):
        small_table(admission="break-even")
    with pytest.raises(CacheError, match="quota of copies in a step: -1"):
        small_table(quota=-1)
    assert small_table(policy="s3-fifo", admission="Second-Touch").policy.name == "S3-FIFO"


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda t: t._where.__setitem__(0, 1), "a slot that nobody finds"),
        (lambda t: t._where.__setitem__(3, 1), "an expert in two slots"),
        (lambda t: t._blocked.add(0), "blocked slots"),
        (lambda t: t._pinned.append(1), "an empty slot is pinned"),
        (lambda t: (t.lookup(0, [1]), t.admit(), t._pinned.append(1)), "a loading slot is pinned"),
        (lambda t: t._free[0].clear(), "free slots"),
        (lambda t: t._index_of.__setitem__(0, 5), "a foreign index"),
        (lambda t: setattr(t, "_left", -1), "the quota is overdrawn"),
    ],
)
def test_check_integrity_sees_damage(damage: object, what: str) -> None:
    table = small_table()
    fill(table, [0])
    table.check_integrity()
    damage(table)  # type: ignore[operator]
    with pytest.raises(AssertionError, match=what):
        table.check_integrity()
