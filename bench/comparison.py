"""What a comparison measures and how: the names of tests, two engines in turn, and the report in three forms."""

from __future__ import annotations

import csv
import io
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hybrid.commands import measure
from hybrid.commands.bench import to_json
from hybrid.commands.measure import Test
from hybrid.engine.engine import Engine
from hybrid.errors import ConfigError
from hybrid.machine.rates import MachineProbe

REST_SECONDS = 0.05  # until the threads of the engine that ran before have gone to sleep
TESTS = "pp128,pp512,pp2048,tg32,tg32@4096,tg32@16384,pp512@4096,tg32x4,tg32x16"
COLUMNS = ("test", "format", "depth", "batch", "ours", "peer", "theirs", "ratio", "limit_share")

Progress = Callable[[str, int, int], None]


class Contender(Protocol):
    """An engine with a model open. `prepare` fills the KV and wakes the threads, `run` is what is timed."""

    def prepare(self, test: Test) -> None: ...
    def run(self, test: Test) -> None: ...


class Probe(Protocol):
    def measure(self) -> None: ...


@dataclass
class Duel:
    """One test of two engines. Seconds of each repetition; limits: the seconds that the machine needs at least."""

    test: Test
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    @property
    def limit_share(self) -> float:
        return statistics.median(limit / seconds for limit, seconds in zip(self.limits, self.ours, strict=True))


class Ours:
    """This engine. A depth is filled once, with random tokens: tests write behind it, so it stays a real context."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._filled = [0] * engine.plan.sequences

    def touch(self) -> None:
        """Map the pages of all weights."""
        measure.touch_weights(self._engine)

    def prepare(self, test: Test) -> None:
        for slot in range(test.batch):
            if self._filled[slot] < test.depth:
                start = self._filled[slot]
                measure.run_sequence(self._engine, slot, start, test.depth - start, logits=False)
                self._filled[slot] = test.depth
        measure.decode_steps(self._engine, test.batch, test.depth, 1)

    def run(self, test: Test) -> None:
        if test.prompt:
            measure.prefill_prompt(self._engine, test)
        else:
            measure.decode_steps(self._engine, test.batch, test.depth, test.generate)

    def limit(self, probe: MachineProbe, test: Test) -> float:
        """Seconds that the machine would need for a test by the last samples of the probe."""
        return measure.limit_seconds(self._engine, probe, test)


def parse_tests(text: str) -> list[Test]:
    """'pp512@4096,tg32x4': prompts of 512 behind 4096 tokens, 32 steps of 4 sequences. Raises ConfigError."""
    return [_parse_test(part.strip()) for part in text.split(",")]


def _parse_test(text: str) -> Test:
    match = re.fullmatch(r"(pp|tg)(\d{1,7})(?:@(\d{1,7}))?(?:x(\d{1,4}))?", text)
    if not match:
        raise ConfigError(f"--tests: {text!r} is no test; write pp512, tg32, tg32@4096 (depth) or tg32x4 (sequences)")
    kind, count, depth, batch = match[1], int(match[2]), int(match[3] or 0), int(match[4] or 1)
    if not count or not batch:
        raise ConfigError(f"--tests: {text!r} counts nothing; its numbers must be at least 1")
    if batch > 1 and depth:
        raise ConfigError(f"--tests: {text!r}: tests of several sequences start at depth 0; leave out @{depth}")
    return Test(count if kind == "pp" else 0, count if kind == "tg" else 0, depth, batch)


def duel(
    ours: Contender,
    theirs: Contender,
    tests: Sequence[Test],
    repetitions: int,
    probe: Probe,
    limit: Callable[[Test], float],
    progress: Progress,
    what: str = "measuring",
) -> list[Duel]:
    """Every test `repetitions` times, all tests once before any twice: ours between two probes, then theirs."""
    duels = [Duel(test) for test in tests]
    for done, (_, entry) in enumerate((r, d) for r in range(repetitions) for d in duels):
        progress(what, done, repetitions * len(duels))
        _round(entry, ours, theirs, probe, limit)
    progress(what, repetitions * len(duels), repetitions * len(duels))
    return duels


def _round(entry: Duel, ours: Contender, theirs: Contender, probe: Probe, limit: Callable[[Test], float]) -> None:
    test = entry.test
    time.sleep(REST_SECONDS)
    ours.prepare(test)
    probe.measure()
    entry.ours.append(timed(ours, test))
    probe.measure()
    entry.limits.append(limit(test))
    time.sleep(REST_SECONDS)
    theirs.prepare(test)
    entry.theirs.append(timed(theirs, test))


def timed(contender: Contender, test: Test) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    contender.run(test)
    return time.perf_counter() - start


def tokens(test: Test) -> int:
    return test.batch * (test.prompt or test.generate)


def result(entry: Duel, format_name: str, peer: str) -> dict[str, Any]:
    """A row of the report: medians in tokens a second."""
    count = tokens(entry.test)
    ours, theirs = count / statistics.median(entry.ours), count / statistics.median(entry.theirs)
    place = (entry.test.name, format_name, entry.test.depth, entry.test.batch)
    return row(place, ours, peer, theirs, entry.limit_share)


def row(place: tuple[str, str, int, int], ours: float, peer: str, theirs: float, limit_share: float) -> dict[str, Any]:
    """place: test, format, depth, batch."""
    values = (*place, round(ours, 2), peer, round(theirs, 2), round(ours / theirs, 3), round(limit_share, 4))
    return dict(zip(COLUMNS, values, strict=True))


def to_markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; {machine['model']}; medians of "
        f"{machine['repetitions']}, tokens/s",
        "",
        *(f"- {line}" for line in machine["notes"]),
        "",
        "| test | format | depth | batch | ours | peer | theirs | ratio | share of limit |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for r in report["results"]:
        speeds = f"{r['ours']:.2f} | {r['peer']} | {r['theirs']:.2f} | {r['ratio']:.2f}x | {r['limit_share']:.1%}"
        lines.append(f"| {r['test']} | {r['format']} | {r['depth']} | {r['batch']} | {speeds} |")
    return "\n".join(lines)


def to_csv(report: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["results"])
    return text.getvalue().rstrip("\n")


OUTPUTS: dict[str, Callable[[dict[str, Any]], str]] = {"md": to_markdown, "csv": to_csv, "json": to_json}
