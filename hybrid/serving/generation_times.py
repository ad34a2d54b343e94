"""`token_gen_time.csv` and `cpu_freq_avg.csv` in the columns of the collaborative inference of arXiv 2512.16473, whose
readers look for these names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from hybrid.machine.meters import Reading
from hybrid.serving.scheduler import StepRecord

TIMES_NAME, CLOCK_NAME = "token_gen_time.csv", "cpu_freq_avg.csv"
TIMES_COLUMNS = (
    "Index",
    "Time",
    "Timestamp",
    "Accumulated Generation Throughput (tokens/s)",
    "CPU Frequency",
    "CPU Temperature",
)
CLOCK_COLUMNS = ("Seconds", "Temperature", "cpu0")

Steps = Sequence[tuple[StepRecord, Reading]]


def decoding(records: Sequence[StepRecord], readings: Sequence[Reading]) -> Steps:
    """The steps that only decode, which alone it counts. readings: one before the first step, and one after each."""
    return [(r, reading) for r, reading in zip(records, readings[1:], strict=False) if not r.prompt_rows and r.sampled]


def time_rows(steps: Steps) -> Iterator[list[Any]]:
    """A row for every step of decoding: its number from 1, its seconds, the whole seconds until its end, steps a second
    so far, MHz and degrees Celsius; nan, which its readers take for a number, where the machine does not tell.
    """
    elapsed = 0.0
    for number, (record, reading) in enumerate(steps, start=1):
        elapsed += record.seconds
        rate = f"{number / elapsed:.3f}" if elapsed else "nan"
        yield [number, f"{record.seconds:.6f}", int(elapsed), rate, _whole(reading.cpu_mhz), _told(reading.cpu_celsius)]


def clock_rows(steps: Steps) -> Iterator[list[Any]]:
    """A row for every second of decoding: its number, degrees Celsius, and the mean clock in MHz, as the step that it
    lies in found them.
    """
    elapsed, second = 0.0, 0
    for record, reading in steps:
        elapsed += record.seconds
        while second <= elapsed:
            yield [second, _told(reading.cpu_celsius), _whole(reading.cpu_mhz)]
            second += 1


def _whole(value: float | None) -> str:
    return "nan" if value is None else str(math.floor(value))


def _told(value: float | None) -> str:
    return "nan" if value is None else f"{value:.1f}"
