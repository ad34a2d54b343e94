"""Measures an engine beside the limits of its machine, in turn, so that both meet the same minute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from cpu_kernels import KEY_BLOCK
from hybrid.core import Batch
from hybrid.engine.engine import Engine
from hybrid.formats.block import round_up
from hybrid.machine.rates import MachineProbe
from hybrid.plan.roofline import step_cost, uses_integers

Progress = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]  # a bar for each test


@dataclass(frozen=True)
class Test:
    """prompt > 0: time a prompt of that many tokens; else time `generate` decoding steps; behind `depth` tokens."""

    prompt: int
    generate: int
    depth: int
    batch: int

    @property
    def name(self) -> str:
        return f"pp{self.prompt}" if self.prompt else f"tg{self.generate}"

    @property
    def length(self) -> int:
        """Tokens of a sequence at the end."""
        return self.depth + (self.prompt or self.generate)


@dataclass
class Measurement:
    """tokens_per_second and limit_shares: one value a repetition; the share is 1 at the machine's limit."""

    test: Test
    tokens_per_second: list[float] = field(default_factory=list)
    limit_shares: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    @property
    def stddev(self) -> float:
        return statistics.stdev(self.tokens_per_second) if len(self.tokens_per_second) > 1 else 0.0

    @property
    def limit_share(self) -> float:
        return statistics.median(self.limit_shares)


def probe_of(engine: Engine) -> MachineProbe:
    """Of the machine as an engine uses it."""
    return MachineProbe(engine.pool, engine.plan.isa, uses_integers(engine.spec, engine.plan.formats))


def run_tests(
    engine: Engine, probe: MachineProbe, tests: Iterable[Test], repetitions: int, progress: Progress
) -> Iterator[Measurement]:
    """Every test `repetitions` times with random tokens; each as soon as it is done."""
    filled: dict[int, int] = {}  # tokens that a sequence holds, by sequence
    for test in tests:
        measurement = Measurement(test)
        with progress() as report:
            fill(engine, test, filled)
            for repetition in range(repetitions):
                report(f"measuring {test.name} at depth {test.depth}", repetition, repetitions)
                _measure(engine, probe, measurement)
        yield measurement


def touch_weights(engine: Engine) -> None:
    """Map the pages of all weights: with random tokens a full step reaches nearly every expert."""
    run_sequence(engine, 0, 0, min(engine.plan.max_rows, engine.plan.max_seq_len), logits=True)


def _measure(engine: Engine, probe: MachineProbe, measurement: Measurement) -> None:
    test = measurement.test
    decode_steps(engine, test.batch, test.depth, 1)  # wake the threads and the caches
    probe.measure()
    start = time.perf_counter()
    if test.prompt:
        prefill_prompt(engine, test)
    else:
        decode_steps(engine, test.batch, test.depth, test.generate)
    seconds = time.perf_counter() - start
    probe.measure()
    tokens = test.batch * (test.prompt or test.generate)
    measurement.tokens_per_second.append(tokens / seconds)
    measurement.limit_shares.append(limit_seconds(engine, probe, test) / seconds)


def limit_seconds(engine: Engine, probe: MachineProbe, test: Test) -> float:
    """Seconds that the machine would need for a test."""
    plan = engine.plan

    def seconds(sequences: int, rows: int, depth: int, logit_rows: int) -> float:
        return probe.seconds(step_cost(engine.spec, plan.formats, plan.kv.format, sequences, rows, depth, logit_rows))

    if not test.prompt:
        return test.generate * seconds(test.batch, 1, test.depth + test.generate // 2, test.batch)
    total = 0.0
    for first in range(0, test.prompt, plan.max_rows):
        count = min(plan.max_rows, test.prompt - first)
        last = first + count == test.prompt
        total += test.batch * seconds(1, count, test.depth + first, int(last))
    return total


def fill(engine: Engine, test: Test, filled: dict[int, int]) -> None:
    """Give the sequences of a test the tokens that it begins behind. filled: how many each has already.

    On the CPU a chunk is computed and then copied, because the time of a whole prompt grows with its square.
    """
    plan = engine.plan
    chunk = round_up(plan.max_rows, KEY_BLOCK)
    for sequence in range(test.batch):
        if filled.get(sequence, 0) >= test.depth:
            continue
        known = min(test.depth, chunk if plan.device_name == "cpu" else test.depth)
        run_sequence(engine, sequence, 0, known, logits=False)
        if known < test.depth:
            engine.addresses.repeat(sequence, known, test.depth)
        filled[sequence] = test.depth


def prefill_prompt(engine: Engine, test: Test) -> None:
    for sequence in range(test.batch):
        run_sequence(engine, sequence, test.depth, test.prompt, logits=True)


def run_sequence(engine: Engine, sequence: int, start: int, count: int, logits: bool) -> None:
    """Run `count` tokens of one sequence in steps as large as the plan allows."""
    for first in range(start, start + count, engine.plan.max_rows):
        last = min(first + engine.plan.max_rows, start + count)
        rows = last - first
        wanted = [rows - 1] if logits and last == start + count else []
        _step(engine, np.full(rows, sequence), np.arange(first, last), wanted)


def decode_steps(engine: Engine, batch: int, depth: int, count: int) -> np.ndarray:
    """Decode `count` tokens, at least one, of `batch` sequences together.

    Returns the logits of the last, float32 [batch, vocabulary], which the next step overwrites.
    """
    for position in range(depth, depth + count):
        logits = _step(engine, np.arange(batch), np.full(batch, position), range(batch))
    return logits


def _step(engine: Engine, sequences: np.ndarray, positions: np.ndarray, logit_rows: Iterable[int]) -> np.ndarray:
    tokens = np.random.default_rng(int(positions[0])).integers(0, engine.spec.vocab, len(sequences))
    parts = (tokens, sequences, positions, np.array(list(logit_rows)))
    return engine.forward(Batch(*(part.astype(np.int32) for part in parts))).logits
