"""`hybrid plot`: figures of what `hybrid run` and `hybrid simulate` wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from hybrid.commands import flags as f
from hybrid.commands.console import exit_codes
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Reals = NDArray[np.float64]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

SUFFIXES = (".png", ".svg")
RESULT_COLUMNS = ("policy", "nblocks", "nways", "slots", "admission", "mapping", "quota", "delay", "calls", "hits")
_PATH: dict[str, Any] = {"parser": f.parse_path, "metavar": "PATH"}
Kind = Annotated[str, typer.Argument(help="hit-rate, speed, layers, reuse or breakdown.", metavar="KIND")]
Source = Annotated[Path, typer.Argument(help="What to draw; see above.", **_PATH)]
Target = Annotated[Path, typer.Argument(help="The figure: .png or .svg.", **_PATH)]
Title = Annotated[str | None, typer.Option("--title", help="Above the figure.", show_default="what was drawn")]


@app.command()
def plot(kind: Kind, source: Source, figure: Target, title: Title = None) -> None:
    """Draw a figure.

    hit-rate: hits against slots by policy, with the bound, from CSV, JSON or --results of hybrid simulate.
    speed: predicted tokens/s against N x M at equal slots, from the same with rates.
    layers: a map of hit rates by layer, over steps from --cachehit-csv, or by policy from JSON or --results.
    reuse: how often tokens and layers choose the same experts, from a trace.
    breakdown: where the time of decoding steps goes, from --breakdown-csv.
    """
    with exit_codes():
        if kind not in KINDS:
            raise ConfigError(f"there is no figure {kind!r}; allowed: {', '.join(KINDS)}")
        check_target(figure)
        if not source.is_file():
            raise ConfigError(f"{source}: there is no such file; give what hybrid run or hybrid simulate wrote")
        draw = KINDS[kind](source, title)
        _check_matplotlib()
        from hybrid.commands.figures import styled

        styled(draw, figure)


def check_target(path: Path) -> None:
    """Raise ConfigError unless a figure can be written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a figure ends in {' or '.join(SUFFIXES)}; name it so")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no directory {path.parent}; make it first")


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "plotting needs matplotlib, which is not installed: pip install 'hybrid-moe[research]'"
        ) from None


def hit_rate(source: Path, title: str | None) -> Callable[[], Figure]:
    from hybrid.commands.figures import hit_rate_figure

    rows = read_results(source)
    return lambda: hit_rate_figure(rows, title or "Hit rate of the expert cache")


def speed(source: Path, title: str | None) -> Callable[[], Figure]:
    from hybrid.commands.figures import speed_figure

    rows = read_results(source)
    if not rows[0].get("tokens_per_second"):
        raise ConfigError(f"{source}: has no tokens/s; give hybrid simulate the rates of a machine (--pcie-gbps ...)")
    return lambda: speed_figure(rows, title or "Predicted speed at equal slots")


def layers(source: Path, title: str | None) -> Callable[[], Figure]:
    from hybrid.commands.figures import layers_figure

    if _is_json(source.read_text(encoding="utf-8", errors="replace")):
        shares, names, shape = layers_of_policies(read_results(source))
        return lambda: layers_figure(
            shares, names, ("MoE layer", 1.0), "", title or f"Hit rate by layer, {shape} slots"
        )
    shares, run = read_hits(source)
    numbers = [str(layer) for layer in range(len(shares))]
    heading = title or "Hit rate by layer" + (f" (means of {run} steps)" if run > 1 else "")
    return lambda: layers_figure(shares, numbers, ("step", float(run)), "MoE layer", heading)


def layers_of_policies(rows: list[Row]) -> tuple[Reals, list[str], str]:
    """Hit rates [policies, layers] at one shape, the middle one of several; names of the policies; the shape."""
    shapes = sorted({(row["slots"], row["nblocks"], row["nways"]) for row in rows})
    middle = shapes[len(shapes) // 2]
    chosen = {_label(row): row for row in rows if (row["slots"], row["nblocks"], row["nways"]) == middle}
    calls = np.array([row["layer_calls"] for row in chosen.values()], np.float64)
    hits = np.array([row["layer_hits"] for row in chosen.values()], np.float64)
    shares = np.divide(hits, calls, out=np.full_like(hits, np.nan), where=calls > 0)
    return shares, list(chosen), f"{middle[1]}×{middle[2]}"


def _label(row: Row) -> str:
    """A policy and what is not as usual."""
    usual = {"admission": "always", "mapping": "modulo", "quota": None, "delay": 0}
    return ", ".join([row["policy"], *(f"{name} {row[name]}" for name in usual if row[name] != usual[name])])


def reuse(source: Path, title: str | None) -> Callable[[], Figure]:
    from gpu_cache.reuse import measure_reuse
    from hybrid.commands.figures import reuse_figure
    from hybrid.errors import cache_errors
    from hybrid.trace_files import read_trace

    with cache_errors():
        measured = measure_reuse(read_trace(source))
    return lambda: reuse_figure(measured, title or "Reuse of experts")


def breakdown(source: Path, title: str | None) -> Callable[[], Figure]:
    from hybrid.commands.figures import breakdown_figure

    parts, beside = split_times(source, read_columns(source, ("total", "prompt_rows", "attention", "moe")))
    return lambda: breakdown_figure(parts, beside, title or "Where the time of a decoding step goes")


KINDS: dict[str, Callable[[Path, str | None], Callable[[], Figure]]] = {
    "hit-rate": hit_rate,
    "speed": speed,
    "layers": layers,
    "reuse": reuse,
    "breakdown": breakdown,
}


def read_results(source: Path) -> list[Row]:
    """The results of `hybrid simulate`. Raises ConfigError for another file."""
    try:
        text = source.read_text(encoding="utf-8")
        rows = _json_rows(source, text) if _is_json(text) else list(csv.DictReader(text.splitlines()))
        usable = bool(rows) and all(name in rows[0] for name in RESULT_COLUMNS)
        if usable:
            return [{**row, **{name: int(row[name]) for name in ("nblocks", "nways", "slots")}} for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error):
        usable = False
    raise ConfigError(
        f"{source}: is not what `hybrid simulate` wrote with --output csv, --output json or --results; write it again"
    )


def _is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def _json_rows(source: Path, text: str) -> list[Row]:
    """The results of --output json, one object, or of --results, an object a line, whose last may be cut off."""
    try:
        whole = json.loads(text)
        if "results" in whole:
            return list(whole["results"])
    except ValueError:
        pass
    entries = [entry for entry in map(_entry, text.splitlines()) if entry is not None]
    traces = {entry["trace"] for entry in entries}
    if len(traces) > 1:
        raise ConfigError(
            f"{source}: holds results of {len(traces)} traces, which one figure cannot compare; "
            "give hybrid simulate a --results file for each"
        )
    return list({entry["name"]: entry["result"] for entry in entries}.values())


def _entry(line: str) -> Row | None:
    """A line of --results."""
    try:
        entry: Row = json.loads(line)
    except ValueError:
        return None
    return entry


def read_columns(source: Path, needed: tuple[str, ...]) -> dict[str, Reals]:
    """The columns of a CSV of numbers. Raises ConfigError naming what is missing or wrong."""
    with open(source, newline="", encoding="utf-8", errors="replace") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    missing = [name for name in needed if name not in header]
    if missing:
        raise ConfigError(f"{source}: has no column {', '.join(missing)}; give a CSV that hybrid run wrote")
    if not rows:
        raise ConfigError(f"{source}: holds no steps; record some first")
    try:
        return dict(zip(header, np.array(rows, np.float64).T, strict=True))
    except ValueError as error:
        raise ConfigError(f"{source}: is not whole ({error}); write it again") from None


def read_hits(source: Path) -> tuple[Reals, int]:
    """Hit rates [layers, runs of steps] of --cachehit-csv, NaN where nothing was called, and the steps of a run."""
    from hybrid.commands.figures import binned

    columns = read_columns(source, ("step", "layer", "calls", "hits"))
    step, layer = columns["step"].astype(int), columns["layer"].astype(int)
    _, step = np.unique(step, return_inverse=True)
    sums = np.zeros((2, layer.max() + 1, step.max() + 1))
    for at, name in enumerate(("hits", "calls")):
        np.add.at(sums[at], (layer, step), columns[name])
    hits, run = binned(sums[0])
    calls, _ = binned(sums[1])
    return np.divide(hits, calls, out=np.full_like(hits, np.nan), where=calls > 0), run


def split_times(source: Path, columns: dict[str, Reals]) -> tuple[dict[str, Reals], dict[str, Reals]]:
    """What the threads did, adding up to the whole, and what the device did beside them; ms of each decoding step."""
    decoding = columns["prompt_rows"] == 0
    if not decoding.any():
        raise ConfigError(f"{source}: holds no decoding steps; run with a larger --max-tokens")
    times: dict[str, Reals] = {name: values[decoding] for name, values in columns.items()}
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
