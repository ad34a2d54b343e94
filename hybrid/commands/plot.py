"""`hybrid plot`: figures of what `hybrid run` and `hybrid simulate` wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.commands import flags as f
from hybrid.commands.console import exit_codes, say
from hybrid.commands.plot_data import is_json, layers_of_policies, read_hits, read_results, read_text, read_times
from hybrid.commands.simulate_output import to_json
from hybrid.errors import ConfigError
from hybrid.files import check_output
from hybrid.lab.figures import FIGURE_KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

SUFFIXES = (".png", ".svg", ".pdf")
_PATH: dict[str, Any] = {"parser": f.parse_path}
Kind = Annotated[str, typer.Argument(help="hit-rate, speed, layers, reuse, breakdown or curve.", metavar="KIND")]
Source = Annotated[Path, typer.Argument(help="What to draw; see above.", metavar="SOURCE", **_PATH)]
Target = Annotated[Path, typer.Argument(help="The figure: .png, .svg or .pdf.", metavar="FIGURE", **_PATH)]
Title = Annotated[
    str | None, typer.Option("--title", help="Above the figure.", metavar="TEXT", show_default="what was drawn")
]
Model = Annotated[str | None, typer.Option("--model", help="The model, named in the title.", metavar="TEXT")]
Shape = Annotated[
    str | None,
    typer.Option("--shape", help="For layers: which of several caches.", metavar="NxM", show_default="the middle one"),
]


@dataclass(frozen=True)
class Wanted:
    """What is drawn, and what stands above it."""

    source: Path
    title: str | None
    model: str | None
    shape: str | None

    def heading(self, what: str, about: str = "") -> str:
        """The title; without one what is drawn, and below it of which model and trace."""
        below = ", ".join(part for part in (self.model, about or self.source.name) if part)
        return self.title or f"{what}\n{below}"


@app.command()
def plot(
    kind: Kind, source: Source, figure: Target, title: Title = None, model: Model = None, shape: Shape = None
) -> None:
    """Draw a figure.

    \b
    hit-rate   hits against slots by policy, with the bound, from CSV,
               JSON or --results of hybrid simulate, or from a trace
    speed      predicted tokens/s against N x M at equal slots, from
               the same with rates
    layers     hit rates by layer, over steps from --cachehit-csv, or
               by policy from JSON or --results
    reuse      how often tokens and layers choose the same experts,
               from a trace
    breakdown  where the time of decoding steps goes, from
               --breakdown-csv
    curve      hits of every size by policy, from CSV or JSON of
               hybrid simulate --curve, or from a trace
    """
    with exit_codes():
        if kind not in KINDS:
            raise ConfigError(f"there is no figure {kind!r}; allowed: {', '.join(KINDS)}")
        check_target(figure)
        draw = KINDS[kind](Wanted(source, title, model, shape))
        _check_matplotlib()
        from hybrid.lab.figures import styled

        styled(draw, figure)


def check_target(path: Path) -> None:
    """Raise ConfigError unless a figure can be written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: a figure ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; name it so")
    check_output("FIGURE", path, FIGURE_KINDS[path.suffix.lower()])


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "plotting needs matplotlib, which is not installed: pip install 'hybrid-moe[research]'"
        ) from None


def _results_of_trace(source: Path) -> str:
    """The results of a trace, replayed in eighths of its experts; "" for a file that is none, and for pipes."""
    from hybrid.commands.simulate import SimulateOptions, replay_all
    from hybrid.errors import cache_errors
    from hybrid.files.traces import is_trace, read_trace

    if not is_trace(source):
        return ""
    with cache_errors():
        experts = read_trace(source).experts
        ways = sorted({max(1, experts * eighth // 8) for eighth in range(1, 9)})
        policies = "LRU,LFU,Belady,bypass-Belady,static-best"
        options = SimulateOptions((str(source),), policy=policies, nways=",".join(map(str, ways)))
        return to_json(replay_all(options))


def hit_rate(wanted: Wanted) -> Callable[[], Figure]:
    from hybrid.lab.figures import hit_rate_figure

    results = read_results(wanted.source, _results_of_trace(wanted.source) or read_text(wanted.source))
    return lambda: hit_rate_figure(results.rows, wanted.heading("Hit rate of the expert cache", results.about))


def speed(wanted: Wanted) -> Callable[[], Figure]:
    from hybrid.lab.figures import speed_figure

    results = read_results(wanted.source, read_text(wanted.source))
    if not all({"tokens_per_second", "cpu_tokens_per_second"} <= set(row) for row in results.rows):
        raise ConfigError(
            f"{wanted.source}: has no tokens/s; give hybrid simulate the rates of a machine (--pcie-gbps ...)"
        )
    return lambda: speed_figure(results.rows, wanted.heading("Predicted speed at equal slots", results.about))


def layers(wanted: Wanted) -> Callable[[], Figure]:
    from hybrid.lab.figures import layers_figure

    text = read_text(wanted.source)
    if not is_json(text):
        return _layers_over_steps(wanted, text)
    results = read_results(wanted.source, text)
    shares, names, shape, shapes = layers_of_policies(wanted.source, results.rows, wanted.shape)
    if len(shapes) > 1 and wanted.shape is None:
        say(f"note: drawn for {shape} slots, the middle one of {', '.join(shapes)}; --shape NxM chooses another")
    heading = wanted.heading(f"Hit rate by layer, {shape.replace('x', '×')} slots", results.about)
    return lambda: layers_figure(shares, names, ("MoE layer", 1.0), "", heading)


def _layers_over_steps(wanted: Wanted, text: str) -> Callable[[], Figure]:
    from hybrid.lab.figures import layers_figure

    if wanted.shape is not None:
        raise ConfigError("--shape chooses among the caches of hybrid simulate; a run has one cache, drop it")
    shares, run = read_hits(wanted.source, text)
    numbers = [str(layer) for layer in range(len(shares))]
    heading = wanted.heading("Hit rate by layer" + (f" (means of {run} steps)" if run > 1 else ""))
    return lambda: layers_figure(shares, numbers, ("step", float(run)), "MoE layer", heading)


def reuse(wanted: Wanted) -> Callable[[], Figure]:
    from gpu_cache.reuse import measure_reuse
    from hybrid.errors import cache_errors
    from hybrid.files.traces import read_trace
    from hybrid.lab.figures import reuse_figure

    with cache_errors():
        trace = read_trace(wanted.source)
        measured = measure_reuse(trace)
    about = f"{wanted.source.name}, {trace.layers} MoE layers of {trace.experts} experts"
    return lambda: reuse_figure(measured, wanted.heading("Reuse of experts", about))


def breakdown(wanted: Wanted) -> Callable[[], Figure]:
    from hybrid.lab.figures import breakdown_figure

    parts, beside = read_times(wanted.source, read_text(wanted.source))
    return lambda: breakdown_figure(parts, beside, wanted.heading("Where the time of a decoding step goes"))


def curve(wanted: Wanted) -> Callable[[], Figure]:
    from hybrid.lab.figures import curves_figure

    results = read_results(wanted.source, _curves_of_trace(wanted.source) or read_text(wanted.source))
    return lambda: curves_figure(results.rows, wanted.heading("Hit rate of every size", results.about))


def _curves_of_trace(source: Path) -> str:
    """Of all policies that have a curve; "" for a file that is no trace, and for pipes."""
    from hybrid.commands.simulate import SimulateOptions, curve_all
    from hybrid.errors import cache_errors
    from hybrid.files.traces import is_trace

    if not is_trace(source):
        return ""
    with cache_errors():
        return to_json(curve_all(SimulateOptions((str(source),), curve=True)))


KINDS: dict[str, Callable[[Wanted], Callable[[], Figure]]] = {
    "hit-rate": hit_rate,
    "speed": speed,
    "layers": layers,
    "reuse": reuse,
    "breakdown": breakdown,
    "curve": curve,
}
