"""A step is checked before it runs, ends when asked to, and leaves Python free meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from kv_pages import KvPages
from rig import BF16, Rig, aligned, format_of, packed, row_stride

import cpu_kernels

BEST = cpu_kernels.available_isas()[0]
PATIENCE = 600  # seconds until a test that hangs fails
WIDTH, OPS = 512, 8_000


class Counting(Rig):
    """A step of OPS products, each adding 1 to every output: seconds with all rows, an instant with one."""

    def __init__(self, threads: int = 1) -> None:
        super().__init__(BEST, threads, rows=512)
        x = aligned((512, WIDTH), BF16)
        x[:, 0] = 1
        weight = np.zeros((WIDTH, WIDTH), BF16)
        weight[:, 0] = 1
        self.output = aligned((512, row_stride(WIDTH)), np.float32)
        shape = {"columns": WIDTH, "inputs": WIDTH, "input_stride": 2 * WIDTH, "output_stride": WIDTH}
        blocks, _ = packed("bf16", weight)
        places = {"format": format_of("bf16"), "input": x, "weight": blocks, "bias": None, "output": self.output}
        for _ in range(OPS):
            self.add("gemm", **places, **shape, accumulate=True)

    @property
    def done(self) -> int:
        """Products whose last element is written."""
        return int(self.output[0, -1])

    def wait_until_running(self) -> None:
        until = time.monotonic() + PATIENCE
        while self.done < 3 and time.monotonic() < until:
            time.sleep(0.001)


@contextmanager
def once_running(rig: Counting, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` from another thread when the step of this one is under way."""
    thread = threading.Thread(target=lambda: (rig.wait_until_running(), act()))
    thread.start()
    yield
    thread.join(PATIENCE)


@pytest.mark.parametrize("threads", [1, 2])
def test_cancelling_ends_a_step_and_the_next_one_works(threads) -> None:
    rig = Counting(threads)
    with pytest.raises(RuntimeError, match="cancelled"), once_running(rig, rig.executor.cancel):
        rig.run(512)
    assert 3 <= rig.done < OPS
    rig.output[...] = 0
    rig.run(1)
    assert (rig.output[0] == OPS).all() and not rig.output[1:].any()


def test_cancelling_before_a_step_ends_that_one_alone() -> None:
    rig = Counting()
    rig.executor.cancel()
    with pytest.raises(RuntimeError, match="cancelled"):
        rig.run(1)
    assert rig.done == 1
    rig.run(1)


def test_ctrl_c_ends_a_step() -> None:
    rig, pressed = Counting(threads=2), []

    def press() -> None:
        pressed.append(rig.done)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), once_running(rig, press):
        rig.run(512)
    assert 3 <= pressed[0] <= rig.done < pressed[0] + OPS // 2  # soon: what a tenth of a second is enough for
    rig.run(1)


def test_other_python_threads_run_during_a_step() -> None:
    rig, seen = Counting(), []

    def watch() -> None:
        rig.wait_until_running()
        while len(set(seen)) < 5 and rig.done < OPS:
            seen.append(rig.done)
        rig.executor.cancel()

    thread = threading.Thread(target=watch)
    thread.start()
    with pytest.raises(RuntimeError, match="cancelled"):
        rig.run(512)
    thread.join(PATIENCE)
    assert len(set(seen)) >= 5


def test_more_threads_than_processors_work() -> None:
    rig = Counting(threads=3 * (os.cpu_count() or 1))
    with pytest.raises(RuntimeError, match="cancelled"), once_running(rig, rig.executor.cancel):
        rig.run(512)
    done = rig.done
    assert (rig.output == rig.output[0, 0]).all() and done >= 3


def test_two_steps_at_once_take_turns() -> None:
    """One pool serves one caller at a time; the other waits."""
    rig = Counting()
    threads = [threading.Thread(target=rig.run, args=(1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert (rig.output[0] == 2 * OPS).all()


@pytest.fixture
def small() -> Rig:
    rig = Rig(BEST, rows=4, sequences=3, positions=300, vocab=10)
    table = aligned((1, 16, 16, 2), np.uint16)
    rig.add("embed", table=table, output=aligned((4, 32), np.float32), hidden=32, pairs=16, output_stride=32)
    return rig


@pytest.mark.parametrize(
    ("places", "tokens", "logit_rows", "message"),
    [
        ([(0, i) for i in range(5)], None, [], "a step of 5 rows; planned for 1 to 4"),
        ([], None, [], "a step of 0 rows"),
        ([(0, 0)], [10], [], "token id 10 is outside the vocabulary of 10"),
        ([(0, 0)], [-1], [], "token id -1"),
        ([(3, 0)], None, [], "sequence 3 of 3"),
        ([(-1, 0)], None, [], "sequence -1"),
        ([(0, 300)], None, [], "position 300 of 300"),
        ([(0, -1)], None, [], "position -1"),
        ([(0, 0), (1, 0), (0, 1)], None, [], "rows of a sequence must be adjacent"),
        ([(0, 1), (0, 1)], None, [], "positions of a sequence must ascend by one"),
        ([(0, 1), (0, 0)], None, [], "positions of a sequence must ascend by one"),
        ([(0, 1), (0, 3)], None, [], "positions of a sequence must ascend by one"),
        ([(0, 0)], None, [1], "logit row"),
        ([(0, 0)], None, [-1], "logit row"),
        ([(0, 0)], None, [0] * 5, "logits of 5 rows; planned for at most 4"),
    ],
)
def test_steps_outside_the_plan_are_refused(small, places, tokens, logit_rows, message) -> None:
    with pytest.raises(ValueError, match=message):
        small.step(places, logit_rows, tokens)
    small.step([(2, 299), (0, 0), (0, 1), (1, 5)], [0, 3], [9, 0, 1, 2])


def test_arrays_of_other_lengths_or_types_are_refused(small) -> None:
    one, two = np.zeros(1, np.int32), np.zeros(2, np.int32)
    logits = np.zeros((1, 10), np.float32)
    none = np.zeros((0, 10), np.float32)
    for arguments in (
        (two, one, one, one, logits),
        (one, one, two, one, logits),
        (one, one, one, one, none),
        (one, one, one, one, np.zeros((1, 9), np.float32)),
    ):
        with pytest.raises(ValueError, match="must"):
            small.executor.step(*arguments)
    for arguments in (  # converting would truncate token ids, or fill a copy with the logits
        (one.astype(np.int64), one, one, one, logits),
        (one, one, one, one, logits.astype(np.float64)),
        (one, one, one, one, np.zeros((1, 20), np.float32)[:, ::2]),
    ):
        with pytest.raises(TypeError):
            small.executor.step(*arguments)


def attention(rig: Rig, heads: int) -> None:
    pages = KvPages(1, 1, 1024, 256)
    buffer = aligned(1 << 16, BF16)
    places = {"q": buffer, "output": buffer, "states": buffer, "sinks": None, "kv": pages.layout}
    sizes = {"heads": heads, "kv_heads": 1, "head_dim": 1024, "output_stride": heads * 1024, "window": 0, "scale": 1.0}
    rig.add("attention", **places, **sizes)


def test_ops_that_exceed_what_was_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="257 query heads per KV head; at most 256"):
        attention(Rig(BEST), 257)


PARTS = ("attention", "moe", "head", "other", "experts", "place", "join")  # in the order of their times


def add_nothing(rig: Rig, part: str) -> None:
    """An op that writes no column."""
    array = aligned(16, np.float32)
    rig.add("embed", part, table=array, output=array, hidden=0, pairs=16, output_stride=32)


def times_of(rig: Rig, logit_rows: int = 1) -> list[float]:
    one = np.zeros(1, np.int32)
    logits = np.zeros((logit_rows, rig.vocab), np.float32)
    return list(rig.executor.step(one, one, one, one[:logit_rows], logits))


@pytest.mark.parametrize("part", PARTS)
def test_times_are_booked_under_the_part_of_the_op(part) -> None:
    rig = Rig(BEST)
    add_nothing(rig, part)
    booked = {name: seconds for name, seconds in zip(PARTS, times_of(rig), strict=True) if seconds}
    assert set(booked) == {part} and booked[part] > 0
    assert any(times_of(rig, logit_rows=0)) == (part != "head")


def test_every_moment_of_a_step_is_booked_once() -> None:
    rig = Counting()
    for part in PARTS:
        add_nothing(rig, part)
    start = time.perf_counter()
    times = times_of(rig)
    assert min(times) > 0 and sum(times) < time.perf_counter() - start


def add_one(rig: Rig, array: np.ndarray) -> None:
    """An op that adds 1 to the first element of each row: a combination of one expert, whose contribution is left 0."""
    ids, ones = aligned((4, 1), np.int32), aligned((4, 1), np.float32, 1)
    sums = {"contributions": aligned((4, 64), np.float32, 1), "output": array, "top_k": 1, "width": 64}
    rig.add("combine", ids=ids, weights=ones, **sums, stride=64, output_stride=64)


def test_a_callback_runs_between_its_neighbours_on_the_thread_of_the_step() -> None:
    rig, seen, array = Rig(BEST, 3), [], aligned((4, 64), np.float32)
    add_one(rig, array)
    rig.executor.host(part=cpu_kernels.Part.place, call=lambda: seen.append((array[0, 0], threading.get_ident())))
    add_one(rig, array)
    rig.run(1)
    assert seen == [(1, threading.get_ident())] and array[0, 0] == 2


def test_what_a_callback_raises_ends_the_step_and_is_raised_by_it() -> None:
    rig, array = Rig(BEST, 2), aligned((4, 64), np.float32)
    rig.executor.host(part=cpu_kernels.Part.place, call=lambda: 1 // 0)
    add_one(rig, array)
    for _ in range(2):  # the executor can be used again
        with pytest.raises(ZeroDivisionError):
            rig.run(1)
    assert array[0, 0] == 0


def test_unknown_instruction_sets_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sse9' is unknown; known: (\w+, )*portable"):
        Rig("sse9")
    with pytest.raises(ValueError, match="sse9"):
        cpu_kernels.missing_features("sse9")
    assert cpu_kernels.available_isas()[-1] == "portable"
