"""What a run measured: its summary and its CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hybrid.files import csv_kind, output_file
from hybrid.machine.meters import CoreMeter, Meters
from hybrid.serving.generation_times import Steps, decoding
from hybrid.serving.scheduler import StepRecord

TIMES = (
    "attention",
    "moe",
    "head",
    "other",
    "sampling",
    "total",
    "cpu_experts",
    "device_experts",
    "copy",
    "lookup",
    "join",
    "wait",
)  # of a step, as `StepTimes` names them
BREAKDOWN_COLUMNS = ("step", "rows", "prompt_rows", "decode_rows", *(f"{part}_ms" for part in TIMES))
CACHEHIT_COLUMNS = ("step", "layer", "calls", "hits", "loading", "misses", "evictions")
TOKEN_COLUMNS = ("token", "prompt", "step", "seconds", "elapsed_seconds", "tokens_per_second", "cpu_mhz")
POWER_COLUMNS = ("step", "tokens", "seconds", "package_watts", "gpu_watts", "joules_per_token")
MUCH_WAITED = 0.3  # of their time; a note says so


@dataclass(frozen=True)
class Summary:
    """A step with prompt rows counts for the prompt speed alone; decode speed is that of the other steps.

    Speeds are rows over the whole time of those steps, sampling and text included; None without such steps.
    first_token_seconds: the time of the steps up to the first that chose a token. waited: what share of their time the
    threads waited for a core, None where that is not known. one_hit, all_hit: of the tokens that were decoded alone at
    the layers that have an expert cache, the share with at least one expert in it, and with all of them, as the
    collaborative inference of arXiv 2512.16473 counts hits; None without such.
    """

    load_seconds: float
    prompt_tokens: int
    prompt_tokens_per_second: float | None
    decode_tokens: int
    decode_tokens_per_second: float | None
    first_token_seconds: float | None
    steps: int
    isa: str
    threads: int
    waited: float | None
    one_hit: float | None = None
    all_hit: float | None = None

    def __str__(self) -> str:
        first = "-" if self.first_token_seconds is None else f"{self.first_token_seconds:.3f} s"
        return "\n".join(
            [
                *self._notes(),
                f"load         {self.load_seconds:.2f} s",
                f"prompt       {_speed(self.prompt_tokens, self.prompt_tokens_per_second)}",
                f"decode       {_speed(self.decode_tokens, self.decode_tokens_per_second)}",
                f"first token  {first}",
                *self._hits(),
                f"ran on       {self.isa}, {self.threads} thread{'s' * (self.threads != 1)}",
            ]
        )

    def _hits(self) -> list[str]:
        if self.one_hit is None or self.all_hit is None:
            return []
        return [f"experts hit  at least one {self.one_hit:.1%}, all {self.all_hit:.1%} (of tokens at cached layers)"]

    def _notes(self) -> list[str]:
        if self.waited is None or self.waited < MUCH_WAITED:
            return []
        return [
            f"note: the threads waited {self.waited:.0%} of the time for a core: "
            "other programs, or a quota, leave fewer than --threads"
        ]


class Recorder:
    """Keeps the record of every step; call it with each. meters: read with each step, if there are any."""

    def __init__(self, meters: Meters | None = None) -> None:
        self.records: list[StepRecord] = []
        self._meters, self._cores = meters, CoreMeter()
        self._readings = [meters.read()] if meters else []  # before the first step, and after each

    def __call__(self, record: StepRecord) -> None:
        self.records.append(record)
        if self._meters:
            self._readings.append(self._meters.read())

    @property
    def decoding(self) -> Steps:
        """The steps of decoding with what was read after them, if there are meters."""
        return decoding(self.records, self._readings)

    def summary(self, load_seconds: float, isa: str, threads: int, cached: int | None = None) -> Summary:
        """cached: layers, the first ones, that have an expert cache; None: all."""
        one_hit, all_hit = _experts_hit(self.records, cached)
        prompt = [record for record in self.records if record.prompt_rows]
        decode = [record for record in self.records if not record.prompt_rows]
        prompt_tokens = sum(record.prompt_rows for record in prompt)
        return Summary(
            load_seconds=load_seconds,
            prompt_tokens=prompt_tokens,
            prompt_tokens_per_second=_rate(prompt_tokens, prompt),
            decode_tokens=sum(record.decode_rows for record in self.records),
            decode_tokens_per_second=_rate(sum(record.decode_rows for record in decode), decode),
            first_token_seconds=_first_token_seconds(self.records),
            steps=len(self.records),
            isa=isa,
            threads=threads,
            waited=self._cores.waited(),
            one_hit=one_hit,
            all_hit=all_hit,
        )

    def breakdown_rows(self) -> list[list[Any]]:
        """One row per step as BREAKDOWN_COLUMNS name them; times in milliseconds."""
        return [_breakdown_row(step, record) for step, record in enumerate(self.records)]

    def cachehit_rows(self) -> Iterator[list[int]]:
        """One row per step and MoE layer as CACHEHIT_COLUMNS name them, of the steps that had a cache."""
        for step, record in enumerate(self.records):
            if record.cache is not None:
                yield from ([step, layer, *counts] for layer, counts in enumerate(record.cache.tolist()))

    def token_rows(self) -> Iterator[list[Any]]:
        """One row per token that was chosen, as TOKEN_COLUMNS name them: each took as long as its step."""
        token, elapsed = 0, 0.0
        for step, (record, reading) in enumerate(zip(self.records, self._readings[1:], strict=False)):
            elapsed += record.seconds
            for prompt in record.prompts:
                token += 1
                times = [f"{record.seconds:.6f}", f"{elapsed:.6f}", f"{token / elapsed:.2f}"]
                yield [token, prompt, step, *times, _readable(reading.cpu_mhz)]

    def power_rows(self) -> Iterator[list[Any]]:
        """One row per step as POWER_COLUMNS name them; the energy per token is of what can be read."""
        for step, (record, (before, after)) in enumerate(zip(self.records, pairwise(self._readings), strict=False)):
            package = _spent(before.package_joules, after.package_joules)
            gpu = _spent(before.gpu_joules, after.gpu_joules)
            known = [joules for joules in (package, gpu) if joules is not None]
            each = sum(known) / record.sampled if known and record.sampled else None
            watts = [None if joules is None else joules / record.seconds for joules in (package, gpu)]
            yield [step, record.sampled, f"{record.seconds:.6f}", *map(_readable, watts), _readable(each)]


def _experts_hit(records: Sequence[StepRecord], cached: int | None) -> tuple[float | None, float | None]:
    """Of tokens that were decoded alone: the shares of their layers with a hit, and with nothing but hits."""
    alone = [
        r.cache[:cached]
        for r in records
        if r.cache is not None and (r.prompt_rows, r.decode_rows, r.guessed) == (0, 1, 0)
    ]
    counts = [pair for layers in alone for pair in layers[:, :2].tolist() if pair[0]]
    if not counts:
        return None, None
    return sum(hits > 0 for _, hits in counts) / len(counts), sum(hits == calls for calls, hits in counts) / len(counts)


def _spent(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _readable(value: float | None) -> str:
    """An empty cell is what this machine does not tell."""
    return "" if value is None else f"{value:.3f}"


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write the whole file or leave what was there. Raises ConfigError and CapacityError."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    with output_file(path, csv_kind(columns)) as file:
        file.write(text.getvalue().encode())


def _breakdown_row(step: int, record: StepRecord) -> list[Any]:
    parts = asdict(record.times)
    times = [f"{parts[name] * 1000:.4f}" for name in TIMES]
    rows = record.prompt_rows + record.decode_rows + record.guessed - record.right
    return [step, rows, record.prompt_rows, record.decode_rows, *times]


def _first_token_seconds(records: Sequence[StepRecord]) -> float | None:
    first = next((index for index, record in enumerate(records) if record.sampled), None)
    return None if first is None else sum(record.seconds for record in records[: first + 1])


def _rate(rows: int, records: Sequence[StepRecord]) -> float | None:
    seconds = sum(record.seconds for record in records)
    return rows / seconds if seconds else None


def _speed(tokens: int, rate: float | None) -> str:
    return f"{tokens} tokens" if rate is None else f"{tokens} tokens, {rate:.1f} tokens/s"
