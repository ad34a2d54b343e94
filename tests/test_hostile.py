"""Every binding is called with wrong types, sizes, strides and addresses: each is refused by an error or runs.

`make sanitize` runs this under ASan, where an access outside of an array ends the process.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from rig import ISAS, Rig, aligned
from test_op_fields import INDEXED, KV, OPS, ROUTING_FIELDS, SET, SHARED, STATE

import cpu_kernels
from cpu_kernels import Arena, Executor, ExpertSet, Format, KvLayout, Part, Routing, StateLayout, ThreadPool

CALLS = 300  # of each binding
REFUSED = (TypeError, ValueError, OverflowError, MemoryError, RuntimeError, IndexError)
TYPES = [None, "text", b"bytes", 1.5, math.nan, math.inf, True, [], (1, 2), {}, object(), np.zeros(3), np.int64(-7)]
NUMBERS = [-1, 0, 1, 2, 3, 15, 63, 65, 1 << 20, (1 << 28) + 1, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**64]
STRUCTS = {
    KvLayout: {
        **{"base": 0, "sequence_stride": 131072, "head_stride": 65536, "value_offset": 32768, "key_dim": 64},
        **{"value_dim": 64, "format": Format.bf16, "key_scales_offset": 0, "value_scales_offset": 0},
    },
    StateLayout: {"base": 0, "sequence_stride": 1472},
    Routing: ROUTING_FIELDS,
    ExpertSet: SET,
}


def hostile(chance: random.Random, value: Any) -> Any:
    """Something else in place of `value`: near it, at the ends of its type, or of another type."""
    kind = chance.randrange(4)
    if kind == 0:
        return chance.choice(TYPES)
    if kind == 1 and isinstance(value, int):
        return value + chance.choice([-64, -16, -1, 1, 2, 4, 64])
    return chance.choice(NUMBERS)


def changed(chance: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with one to three of them replaced, left out or added."""
    made = dict(fields)
    for name in chance.sample(sorted(made), min(len(made), chance.randint(1, 3))):
        if chance.random() < 0.1:
            del made[name]
        else:
            made[name] = hostile(chance, made[name])
    if chance.random() < 0.05:
        made["colour"] = 1
    return made


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What it returns; None if it refuses."""
    try:
        return function(*arguments, **named)
    except REFUSED as error:
        assert str(error)  # noqa: PT017
        return None


def executor(isa: str) -> Executor:
    limits = {"rows": 4, "sequences": 2, "positions": 256, "vocab": 40, "scratch_bytes": 1 << 20}
    return Executor(isa=isa, pool=ThreadPool(1, []), **limits)


class Memory:
    """A zeroed array of its own for every address of an op, larger than fields as they are read or write."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def place(self) -> int:
        self.arrays.append(aligned(1 << 19, np.uint8))
        return int(self.arrays[-1].ctypes.data)

    def placed(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The same fields, their addresses replaced."""
        return {name: self._placed(value) for name, value in fields.items()}

    def _placed(self, value: Any) -> Any:
        if isinstance(value, int) and value == ROUTING_FIELDS["rows"]:
            return self.place()
        if isinstance(value, list) and value:
            return [self.place() for _ in value]
        if isinstance(value, Routing):
            return Routing(**{name: self.place() for name in ROUTING_FIELDS})
        if value is KV or value is SHARED or value is INDEXED:
            apart = {} if value is KV else {"head_stride": 0, "value_offset": 0, "shared": True}
            apart |= {"index_offset": 65536, "index_dim": 32} if value is INDEXED else {}
            return KvLayout(**{**STRUCTS[KvLayout], **apart, "base": self.place()})
        return StateLayout(**{**STRUCTS[StateLayout], "base": self.place()}) if value is STATE else value


@pytest.mark.parametrize("op", OPS)
def test_ops(isa, op) -> None:
    """What is accepted runs, where it has about the size of what it was changed from."""
    chance, memory, ran = random.Random(op), Memory(), 0
    fields = memory.placed(OPS[op])
    ints = {name: value for name, value in fields.items() if type(value) is int and 0 < value < 1 << 20}
    for number in range(CALLS):  # the first time as they are
        given, to = changed(chance, fields) if number else fields, executor(isa)
        call(cpu_kernels.scratch_bytes, op, isa, 4, **given)
        call(getattr(to, op), part=Part.other, **given)
        if to.op_count and all(_near(given.get(name), value, name in ints) for name, value in fields.items()):
            rows = np.arange(3, dtype=np.int32)
            call(to.step, rows, np.zeros(3, np.int32), rows, np.zeros(0, np.int32), np.zeros((0, 40), np.float32))
            ran += 1
    assert ran


def _near(given: Any, value: Any, is_size: bool) -> bool:
    """Whether a field is as it was, or a size not much larger."""
    return given is value or (is_size and type(given) is int and given <= 2 * max(value, 64))


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_structs(struct) -> None:
    chance = random.Random(struct.__name__)
    for _ in range(CALLS):
        call(struct, **changed(chance, STRUCTS[struct]))


def arrays(chance: random.Random) -> Iterator[Any]:
    """Four arrays of ints and one of logits, of which some are not as they must be."""
    rows, wanted = chance.randint(0, 6), chance.randint(0, 6)
    shapes = [rows, rows, rows, wanted]
    if chance.random() < 0.3:
        shapes[chance.randrange(4)] += chance.choice([-1, 1, 1000])
    ends = [10, 3, 300, max(rows, 1)]
    for size, end in zip(shapes, ends, strict=True):
        size = max(size, 0)
        low, high = (0, end) if chance.random() < 0.8 else chance.choice([(-3, end + 3), (-(2**31), 2**31 - 1)])
        array = np.random.default_rng(chance.randrange(1 << 30)).integers(low, high, size).astype(np.int32)
        yield _odd(chance, np.sort(array) if chance.random() < 0.5 else array)
    shape = [max(shapes[3], 0), 10]
    if chance.random() < 0.2:
        shape[chance.randrange(2)] += chance.choice([1, -1, 1000])
    yield _odd(chance, np.zeros([max(size, 0) for size in shape], np.float32))


def _odd(chance: random.Random, array: np.ndarray) -> Any:
    """The array, or with a chance of one in ten something that is none, or not as C++ reads it."""
    if chance.random() < 0.9:
        return array
    read_only = array.copy()
    read_only.flags.writeable = False
    wide = np.repeat(array, 2, axis=0)[::2]
    others = [array.astype(np.int64), array[::-1], wide, array[None], array.tolist(), None, 3, read_only, array.T]
    return chance.choice([*others, array.astype(">i4"), np.zeros(0), *TYPES])


def small_model(isa: str) -> Rig:
    rig = Rig(isa, rows=4, sequences=3, positions=300, vocab=10)
    table = aligned((1, 16, 16, 2), np.uint16)
    rows = aligned((4, 32), np.float32)
    rig.add("embed", table=table, output=rows, hidden=32, pairs=16, output_stride=32)
    return rig


def test_steps(isa) -> None:
    chance, rig, ran = random.Random(1), small_model(isa), 0
    for _ in range(4 * CALLS):
        given = list(arrays(chance))
        checked = call(lambda *rows: rig.executor.check_rows(*rows) or True, *given[:4])
        done = call(rig.executor.step, *given)
        assert not done or checked
        ran += done is not None
    assert ran > 20


def test_executors() -> None:
    chance = random.Random(2)
    right = {"isa": ISAS[0], "pool": ThreadPool(1, []), "rows": 4, "sequences": 2, "positions": 256, "vocab": 40}
    large = (1 << 20, (1 << 28) + 1)  # which would only take memory
    for _ in range(CALLS):
        given = changed(chance, right | {"scratch_bytes": 4096, "batch_invariant": False})
        if not any(given.get(name) in large for name in ("rows", "sequences")):
            call(Executor, **given)
    for name in ("rows", "sequences", "positions", "vocab"):
        with pytest.raises(ValueError, match=f"{name} is 2147483647; it must be at least 1 and at most 268435456"):
            Executor(**right | {"scratch_bytes": 0, name: 2**31 - 1})
    with pytest.raises(ValueError, match="scratch_bytes is 18446744073709551615; it must be at most"):
        Executor(**right, scratch_bytes=2**64 - 1)


def test_arenas_and_threads() -> None:
    chance = random.Random(3)
    for _ in range(CALLS):
        call(Arena, **changed(chance, {"bytes": 4096, "huge": False, "node": -1}))
        threads = {"threads": chance.choice([-(2**31), -1, 0, 1, 2, "1", None]), "cpus": [], "nodes": 1}
        call(ThreadPool, **threads | {"nodes": hostile(chance, 1)})
        call(ThreadPool, **threads | {"cpus": [hostile(chance, 0)]})
    arena, pool = Arena(10000), ThreadPool(2, [])
    for _ in range(CALLS):
        offset, size = (chance.choice([*NUMBERS, 4096, 8192, 10000, 10001]) for _ in range(2))
        call(arena.clear, offset, size)
        call(arena.use_huge, offset, size)
        found = call(pool.node_of, hostile(chance, 1))
        assert found in (None, 0)


def test_probes(isa) -> None:
    chance, memory, pool = random.Random(4), aligned(1 << 16, np.uint8), ThreadPool(1, [])
    for _ in range(CALLS):
        where = {"address": memory.ctypes.data, "bytes": memory.nbytes}
        odd = {
            "address": chance.choice([0, -1, 2**64 - 64, 2**64, None, "0"]),
            "bytes": chance.choice([-1, 2**63, 1.5]),
        }
        name = chance.choice(sorted(odd))
        assert call(cpu_kernels.read_bandwidth, pool, isa, **where | {name: odd[name]}) is None
        assert call(cpu_kernels.read_bandwidth, pool, chance.choice(["", "none", None, 3]), **where) is None
        rounds = chance.choice([0, -1, -(2**31), 2**64, None, 1.5])
        for probe in (cpu_kernels.peak_flops, cpu_kernels.peak_int_ops):
            assert call(probe, pool, isa, rounds) is None
        assert call(cpu_kernels.phase_seconds, pool, rounds) is None
        call(cpu_kernels.missing_features, chance.choice(["", "none", isa, None, 3]))
        call(cpu_kernels.reading, chance.choice(["", None, 3, object()]))


def test_ids_that_no_expert_has_damage_their_row_alone(isa) -> None:
    """Python may write what rows choose."""
    ids = np.array([[1, 0], [7, 2**31 - 1], [3, 2]], np.int32)
    routing = {"offsets": 5, "rows": 6, "active": 4, "count": 1}
    arrays = {name: aligned(size, np.int32) for name, size in routing.items()}
    weights, given = aligned(6, np.float32), aligned((3, 2), np.float32, 0.5)
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    rig = Rig(isa)
    table = Routing(**addresses, weights=weights.ctypes.data)
    rig.add("group", ids=ids, weights=given, routing=table, experts=4, top_k=2)
    rig.run(3)
    assert arrays["offsets"].tolist() == [0, 3, 4, 5, 6] and arrays["rows"].tolist() == [0, 1, 1, 0, 2, 2]
    assert np.isnan(weights[arrays["rows"] == 1]).all() and (weights[arrays["rows"] != 1] == 0.5).all()


class Called(Rig):
    """An executor that calls back: `act` is what it does then."""

    def __init__(self, isa: str, threads: int = 2) -> None:
        super().__init__(isa, threads)
        self.act: Callable[[], Any] = lambda: None
        self.pool = ThreadPool(threads, [])
        self.executor = Executor(
            isa=isa, pool=self.pool, rows=4, sequences=2, positions=256, vocab=40, scratch_bytes=1 << 16
        )
        self.executor.host(part=Part.other, call=lambda: self.act())
        self.sums, self.output = aligned((4, 64), np.float32), aligned((4, 64), np.float32)
        self.add_join()

    def add_join(self) -> None:
        """Partial sums that are joined even in a step that ends."""
        self.executor.join(
            part=Part.other, partials=[self.sums.ctypes.data], output=self.output.ctypes.data, width=64,
            output_stride=64,
        )  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_a_callback_cannot_use_what_calls_it(isa, threads) -> None:
    rig = Called(isa, threads)
    other = Executor(isa=isa, pool=rig.pool, rows=4, sequences=2, positions=256, vocab=40, scratch_bytes=0)
    other.host(part=Part.other, call=lambda: None)
    rows = np.zeros(1, np.int32)
    step = (rows, rows, rows, rows[:0], np.zeros((0, 40), np.float32))
    acts: dict[str, Callable[[], Any]] = {
        "step": lambda: rig.executor.step(*step),
        "check_rows": lambda: rig.executor.check_rows(*step[:4]),
        "another": lambda: other.step(*step),
        "host": lambda: rig.executor.host(part=Part.other, call=print),
        "add": lambda: rig.add_join(),
        "bandwidth": lambda: cpu_kernels.read_bandwidth(rig.pool, isa, rig.sums.ctypes.data, rig.sums.nbytes),
        "barrier": lambda: cpu_kernels.phase_seconds(rig.pool, 1),
    }
    for act in acts.values():
        rig.act = act
        with pytest.raises(ValueError, match="callback"):
            rig.executor.step(*step)
        rig.act = lambda: None
        rig.executor.step(*step)
        other.step(*step)


def test_an_exception_of_a_callback_before_sums_are_joined(isa) -> None:
    rig = Called(isa)
    rig.act = lambda: 1 / 0
    for _ in range(3):
        rig.sums[:] = 1
        with pytest.raises(ZeroDivisionError):
            rig.step([(0, 0)])
        assert not rig.sums[0].any() and rig.sums[1].all()
    rig.act = lambda: None
    rig.step([(0, 0)])


def test_what_a_step_reads_may_change_meanwhile(isa) -> None:
    """Rows are those that were checked, though a callback writes to the arrays."""
    rig = small_model(isa)
    tokens, zeros = np.zeros(2, np.int32), np.zeros(2, np.int32)
    positions = np.arange(2, dtype=np.int32)
    changed_executor = Executor(
        isa=isa, pool=ThreadPool(1, []), rows=4, sequences=3, positions=300, vocab=10, scratch_bytes=0
    )
    changed_executor.host(part=Part.other, call=lambda: tokens.fill(2**31 - 1))
    table, output = aligned((1, 16, 16, 2), np.uint16), aligned((4, 32), np.float32)
    changed_executor.embed(
        part=Part.other, table=table.ctypes.data, output=output.ctypes.data, hidden=32, pairs=16, output_stride=32
    )
    changed_executor.step(tokens, zeros, positions, zeros[:0], np.zeros((0, 10), np.float32))
    assert (tokens == 2**31 - 1).all() and not output.any() and rig.executor.op_count == 1


def test_ops_are_not_added_while_another_thread_steps(isa) -> None:
    rig, inside, leave = Called(isa), threading.Event(), threading.Event()

    def act() -> None:
        inside.set()
        leave.wait(60)

    rig.act = act
    thread = threading.Thread(target=rig.step, args=([(0, 0)],))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(ValueError, match="join: a step runs; ops are added between steps"):
        rig.add_join()
    leave.set()
    thread.join()
    rig.add_join()


def test_a_step_of_no_ops_is_refused(isa) -> None:
    rows = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="no op yet"):
        executor(isa).step(rows, rows, rows, rows[:0], np.zeros((0, 40), np.float32))
