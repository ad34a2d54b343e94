"""What `hybrid plot` draws, read from the files of `hybrid run` and `hybrid simulate` and checked."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.files import Reading, read_file
from hybrid.lab.figures import binned
from hybrid.lab.kept_results import read_entries

Row = dict[str, Any]
Reals = NDArray[np.float64]
SOURCES = Reading(1 << 30, "give what hybrid run or hybrid simulate wrote")
_AGAIN = "is not what `hybrid simulate` wrote with --output csv, --output json or --results; write it again"
_LARGEST = 1 << 53  # counts up to here are exact in a figure
_MAX_CELLS = 1 << 26  # steps times layers


@dataclass(frozen=True)
class Results:
    """Rows of `hybrid simulate`, and the traces that they are of, in words."""

    rows: list[Row]
    about: str


def read_text(source: Path) -> str:
    """All of a file, or of a pipe. Raises ConfigError."""
    return read_file(source, SOURCES).decode("utf-8", "replace").removeprefix("\ufeff")


def read_results(source: Path, text: str) -> Results:
    """The results of `hybrid simulate`; of several traces the means. Raises ConfigError for another file."""
    try:
        rows, about = _json_rows(source, text) if is_json(text) else (list(csv.DictReader(io.StringIO(text))), "")
        means = [row for row in rows if row.get("traces")]
        checked = [_checked(row) for row in means or rows]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error):
        checked, about = [], ""
    if not checked:
        raise ConfigError(f"{source}: {_AGAIN}")
    return Results(checked, about or _trace_of(rows))


def is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def _trace_of(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(Path(str(row["trace"])).name for row in rows if row.get("trace")))
    return ", ".join(names) if len(names) < 4 else f"{len(names)} traces"


def _json_rows(source: Path, text: str) -> tuple[list[Row], str]:
    """The results of --output json, one object, or of --results, an object a line, whose last may be cut off."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = {}
    if "results" in whole:
        return list(whole["results"]), _about(whole["provenance"])
    entries = list(read_entries(text.encode()))
    traces = {entry["trace"] for entry in entries}
    if len(traces) > 1:
        raise ConfigError(
            f"{source}: holds results of {len(traces)} traces, which one figure cannot compare; "
            "give hybrid simulate a --results file for each"
        )
    kept = {_setting_of(entry["result"]): entry["result"] for entry in entries}  # of older code the last line is newer
    return list(kept.values()), ""


def _about(provenance: Row) -> str:
    traces = provenance.get("traces", [provenance["trace"]])
    names = [Path(str(trace["file"])).name for trace in traces if "file" in trace]
    shape = f"{traces[0]['layers']} MoE layers of {traces[0]['experts']} experts, {_steps(traces)} steps"
    return ", ".join([*(names if len(names) < 4 else [f"{len(names)} traces"]), shape])


def _steps(traces: Sequence[Row]) -> int:
    return sum(int(trace["steps"]) for trace in traces)


def _setting_of(row: Row) -> tuple[str, ...]:
    names = (*(name for name in _COLUMNS if name not in _COUNTS), "quota", "prefetch", "seed", "cpu_tokens_per_second")
    return tuple(str(row.get(name)) for name in names)


def _checked(row: Mapping[str, Any]) -> Row:
    """A row with numbers where they belong. Raises ValueError, TypeError or KeyError."""
    row = {name: value for name, value in row.items() if name and value not in ("", None)}
    found: Row = {"quota": None, "seed": 0, "prefetch": "none", "upper_bound": None, **row}
    for name, read in _COLUMNS.items():
        found[name] = read(row[name])
    for name, read in _OPTIONAL.items():
        if row.get(name) is not None:
            found[name] = read(row[name])
    if not 0 <= found["hits"] <= found["calls"] or not found["calls"]:
        raise ValueError("more hits than calls")
    if len(found.get("layer_calls", ())) != len(found.get("layer_hits", ())):
        raise ValueError("layers without hits")
    return found


def _count(value: Any) -> int:
    number = int(value)
    if isinstance(value, float | bool) or not 0 <= number < _LARGEST:
        raise ValueError(value)
    return number


def _real(value: Any) -> float:
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(value)
    return number


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _counts(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise TypeError(value)
    return [_count(part) for part in value]


_COUNTS = ("calls", "hits")
_COLUMNS: dict[str, Callable[[Any], Any]] = {
    "policy": _word, "admission": _word, "mapping": _word,
    "nblocks": _count, "nways": _count, "slots": _count, "delay": _count, "calls": _count, "hits": _count,
}  # fmt: skip
_OPTIONAL: dict[str, Callable[[Any], Any]] = {
    "quota": _count, "seed": _count, "upper_bound": _count, "layer_calls": _counts, "layer_hits": _counts,
    "hit_rate": _real, "hit_rate_stdev": _real, "tokens_per_second": _real, "tokens_per_second_stdev": _real,
    "cpu_tokens_per_second": _real, "prefetch": _word,
}  # fmt: skip


def layers_of_policies(source: Path, rows: list[Row], wanted: str | None) -> tuple[Reals, list[str], str, list[str]]:
    """Hit rates [policies, layers] at one shape; names of the policies; the shape, and all that there are.

    wanted: the shape as NxM; None: the middle one. Raises ConfigError for one that is not there.
    """
    by_shape: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: (row["slots"], row["nblocks"], row["nways"])):
        if len(row.get("layer_calls", ())) != len(rows[0].get("layer_calls", ())) or "layer_hits" not in row:
            raise ConfigError(f"{source}: has no hits by layer; give --output json or --results of hybrid simulate")
        by_shape.setdefault(f"{row['nblocks']}x{row['nways']}", {})[_label(row)] = row
    shapes = list(by_shape)
    shape = shapes[len(shapes) // 2] if wanted is None else wanted.lower().replace("×", "x")
    if shape not in by_shape:
        raise ConfigError(f"--shape {wanted} is not in {source}; it has {', '.join(shapes)}")
    chosen = by_shape[shape]
    calls = np.array([row["layer_calls"] for row in chosen.values()], np.float64)
    hits = np.array([row["layer_hits"] for row in chosen.values()], np.float64)
    return _shares(hits, calls), list(chosen), shape, shapes


def _label(row: Row) -> str:
    """A policy and what is not as usual."""
    usual = {"admission": "always", "mapping": "modulo", "quota": None, "delay": 0, "seed": 0, "prefetch": "none"}
    return ", ".join([row["policy"], *(f"{name} {row[name]}" for name in usual if row[name] != usual[name])])


def _shares(hits: Reals, calls: Reals) -> Reals:
    """NaN where nothing was called."""
    return np.divide(hits, calls, out=np.full_like(hits, np.nan), where=calls > 0)


def read_columns(source: Path, text: str, needed: Mapping[str, str]) -> dict[str, Reals]:
    """The columns of a CSV of numbers, without the units after their names; an empty cell is NaN.

    needed: columns, and for each the unit that an older file had without saying so. Raises ConfigError naming what is
    missing or wrong.
    """
    try:
        header, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    except csv.Error as error:
        raise ConfigError(f"{source}: is no CSV ({error}); write it again") from None
    names = [name.strip() for name in header]
    plain = [name.removesuffix(f"_{needed.get(name.rpartition('_')[0])}") for name in names]
    missing = [name for name in needed if name not in plain]
    if missing:
        raise ConfigError(f"{source}: has no column {', '.join(missing)}; give a CSV that hybrid run wrote")
    if not rows:
        raise ConfigError(f"{source}: holds no steps; record some first")
    try:
        cells = [[cell or "nan" for cell in row] for row in rows]
        columns = dict(zip(plain, np.array(cells, np.float64).T, strict=True))
    except ValueError as error:
        raise ConfigError(f"{source}: is not whole ({error}); write it again") from None
    for name in needed:
        if not ((columns[name] >= 0) & (columns[name] < _LARGEST)).all():
            raise ConfigError(f"{source}: has a {name} that is no number from 0 on; write it again")
    return columns


def read_hits(source: Path, text: str) -> tuple[Reals, int]:
    """Hit rates [layers, runs of steps] of --cachehit-csv, NaN where nothing was called, and the steps of a run."""
    columns = read_columns(source, text, dict.fromkeys(("step", "layer", "calls", "hits"), ""))
    layer = columns["layer"].astype(np.int64)
    _, step = np.unique(columns["step"], return_inverse=True)
    shape = int(layer.max()) + 1, int(step.max()) + 1
    if math.prod(shape) > _MAX_CELLS:
        raise ConfigError(f"{source}: has {shape[0]} layers in {shape[1]} steps, which no figure shows; cut it")
    sums = np.zeros((2, *shape))
    for at, name in enumerate(("hits", "calls")):
        np.add.at(sums[at], (layer, step), columns[name])
    hits, run = binned(sums[0])
    calls, _ = binned(sums[1])
    return _shares(hits, calls), run


def read_times(source: Path, text: str) -> tuple[dict[str, Reals], dict[str, Reals]]:
    """What the threads did, adding up to the whole, and what the device did beside them; ms of each decoding step."""
    columns = read_columns(source, text, dict.fromkeys(("total", "attention", "moe"), "ms") | {"prompt_rows": ""})
    return split_times(source, {name.removesuffix("_ms"): values for name, values in columns.items()})


def split_times(source: Path, columns: dict[str, Reals]) -> tuple[dict[str, Reals], dict[str, Reals]]:
    decoding = columns["prompt_rows"] == 0
    if not decoding.any():
        raise ConfigError(f"{source}: holds no decoding steps; run with a larger --max-tokens")
    times: dict[str, Reals] = {name: np.nan_to_num(values[decoding]) for name, values in columns.items()}
    within = {label: times[name] for name, label in WITHIN_EXPERTS.items() if name in times and times[name].any()}
    router = np.maximum(times["moe"] - sum(within.values()), 0)
    first = {"attention": times["attention"], "router and rest of MoE" if within else "MoE": router}
    last: dict[str, Reals] = {name: times[name] for name in ("head", "other", "sampling") if name in times}
    beside = {label: times[name] for name, label in BESIDE.items() if name in times and times[name].any()}
    return {**first, **within, **last}, beside


WITHIN_EXPERTS = {
    "cpu_experts": "experts on the CPU",
    "lookup": "cache lookup",
    "join": "join",
    "wait": "wait for device",
}
BESIDE = {"device_experts": "experts on the device", "copy": "copies"}
