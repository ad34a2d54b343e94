"""The results of `hybrid simulate` as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hybrid.commands.spread import spread
from hybrid.commands.tables import markdown

Row = dict[str, Any]
PARAMETERS = ("nblocks", "nways", "mapping", "quota", "delay", "policy", "admission", "prefetch")
WORDS = ("policy", "admission", "mapping", "prefetch")


def to_json(report: Row) -> str:
    return json.dumps(report, indent=2)


def to_csv(report: Row) -> str:
    """One line a setting, and with several traces one a replay before them. By layer or part only JSON says it."""
    rows = [*report.get("replays", ()), *report["results"]]
    columns = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list | dict))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def to_table(report: Row) -> str:
    """A markdown table; parameters that are the same everywhere stand above it."""
    results: list[Row] = report["results"]
    replays: list[Row] = report.get("replays", results)
    varied = [name for name in PARAMETERS if name == "policy" or len({str(row[name]) for row in results}) > 1]
    fixed = ", ".join(f"{name} {_text(results[0][name])}" for name in PARAMETERS if name not in varied)
    bounds = {_place(row): row["upper_bound"] for row in replays if row["policy"] == "bypass-Belady"}
    replays = [{**row, "bound": bounds.get(_place(row)) if row["prefetch"] == "none" else None} for row in replays]
    figures = {**FIGURES}
    if any(row["prefetched"] for row in replays):
        figures |= AHEAD
    if "tokens_per_second" in replays[0]:
        figures["tokens/s"] = (lambda row: float(row["tokens_per_second"]), "{:.2f}")
    body = [
        [_text(row[name]) for name in varied] + [_cell(replays[at :: len(results)], *how) for how in figures.values()]
        for at, row in enumerate(results)
    ]
    columns, texts = [*varied, *figures], [name in WORDS for name in (*varied, *figures)]
    if len(replays) == len(results):
        columns, texts = [*columns, "95 %", "beside the first"], [*texts, False, False]
        body = [[*cells, *more] for cells, more in zip(body, _intervals(results), strict=True)]
    lines = [heading(report) + (f"; {fixed}" if fixed else ""), ""]
    lines += markdown(columns, body, texts)
    if "cpu_tokens_per_second" in replays[0]:
        cpu = _cell(replays[:: len(results)], lambda row: float(row["cpu_tokens_per_second"]), "{:.2f}")
        lines += ["", f"with every expert on the CPU: {cpu} tokens/s"]
    return "\n".join(lines)


FIGURES: dict[str, tuple[Callable[[Row], float | None], str]] = {
    "hits": (lambda row: 100 * row["hit_rate"], "{:.1f}%"),
    "of the bound": (lambda row: 100 * row["hits"] / row["bound"] if row["bound"] else None, "{:.1f}%"),
    "copies a step": (lambda row: row["fills"] / row["steps"], "{:.2f}"),
    "loading": (lambda row: 100 * row["loading"] / row["calls"], "{:.1f}%"),
}

AHEAD: dict[str, tuple[Callable[[Row], float | None], str]] = {
    "copied ahead a step": (lambda row: row["prefetched"] / row["steps"], "{:.2f}"),
    "of them used": (
        lambda row: 100 * row["prefetch_used"] / row["prefetched"] if row["prefetched"] else None,
        "{:.1f}%",
    ),
}


def _intervals(results: Sequence[Row]) -> Iterator[list[str]]:
    """Of each hit rate, and of its difference to the first of the same cache, in points."""
    from gpu_cache.intervals import interval

    first: dict[tuple[Any, ...], Row] = {}
    for row in results:
        base = first.setdefault(tuple(row[name] for name in PARAMETERS[:5]), row)
        apart = ""
        if row is not base:
            hits, others = np.array(row["block_hits"]), np.array(base["block_hits"])
            ends = interval(hits - others, np.array(row["block_calls"]))
            apart = f"{100 * (row['hit_rate'] - base['hit_rate']):+.1f} ({_range(ends, '{:+.1f}')})"
        rate = None if row["hit_rate_low"] is None else (row["hit_rate_low"], row["hit_rate_high"])
        yield [_range(rate, "{:.1f}"), apart]


def _range(ends: Sequence[float] | None, form: str) -> str:
    return "-" if ends is None else " to ".join(form.format(100 * end) for end in ends)


def _cell(rows: Sequence[Row], figure: Callable[[Row], float | None], form: str) -> str:
    """The figure of one replay, or of several the mean and the standard deviation."""
    values = [value for row in rows if (value := figure(row)) is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return form.format(values[0])
    mean, deviation = spread(values)
    return f"{form.format(mean)} ± {form.format(deviation).removesuffix('%')}"


def heading(report: Row) -> str:
    """How much of which traces."""
    traces = report["provenance"].get("traces", [report["provenance"]["trace"]])
    calls, steps = (sum(trace[name] for trace in traces) for name in ("calls", "steps"))
    several = f"{len(traces)} traces, mean ± standard deviation: " if len(traces) > 1 else ""
    shape = f"{traces[0]['layers']} layers x {traces[0]['experts']} experts"
    return f"{several}{calls} calls of {shape} in {steps} steps"


def _place(row: Row) -> tuple[Any, ...]:
    """What a bound depends on; delays do not lower it."""
    return row["trace"], row["nblocks"], row["nways"], row["mapping"], row["quota"]


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
