"""The figures of `hybrid plot`: readable in print and on screen, and by those who do not tell red from green."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hybrid.files import FileKind, output_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gpu_cache.reuse import Reuse

Row = Mapping[str, Any]
Reals = NDArray[np.float64]

# Okabe and Ito, Color universal design, 2008; yellow is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
MARKERS = "osD^vPX*<>"
BLACK, GREY = "#222222", "#8C8C8C"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "text.parse_math": False,  # names may have dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "hybrid",
}
BOUND, STATIC = "bypass-Belady", ("static-best", "static-layers")
FIGURE_KINDS = {
    ".png": FileKind("a PNG figure", lambda head: head.startswith(b"\x89PNG")),
    ".svg": FileKind("an SVG figure", lambda head: b"<svg" in head),
    ".pdf": FileKind("a PDF figure", lambda head: head.startswith(b"%PDF")),
}
LEGEND_LINE = 0.18  # inches
_CELLS = 240  # columns of a heat map and points of an area at most


@dataclass(frozen=True)
class Series:
    """One line: its points, and how it looks."""

    label: str
    x: list[float]
    y: list[float]
    spread: list[float]  # of y over several traces, 0 of one
    look: dict[str, Any]


def new_figure(width: float, height: float, columns: int = 1, **more: Any) -> tuple[Figure, list[Axes]]:
    """A figure in inches with panels side by side. Nothing global is touched but the style within `styled`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **more)
    return figure, list(axes[0])


def styled(draw: Callable[[], Figure], path: Path) -> None:
    """Draw in our style and write PNG, SVG or PDF, the same bytes for the same data; the file is whole or not there."""
    import matplotlib

    kind = path.suffix.lower().lstrip(".")
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {"Software": None})
    with matplotlib.rc_context(STYLE), output_file(path, FIGURE_KINDS[f".{kind}"]) as file:
        draw().savefig(file, format=kind, dpi=200, metadata=metadata)


def hit_rate_figure(rows: Sequence[Row], title: str) -> Figure:
    """Hit rate against slots, a line for each policy, the bound above them; a panel for each number of indexes."""
    blocks = sorted({int(row["nblocks"]) for row in rows})
    ways = {count: {row["nways"] for row in rows if row["nblocks"] == count} for count in blocks}
    if max(map(len, ways.values())) == 1:  # the indexes vary, not the ways
        panels: list[tuple[str, list[Row]]] = [("", list(rows))]
    else:
        panels = [(f"N = {count} indexes", [row for row in rows if row["nblocks"] == count]) for count in blocks]
    figure, axes = new_figure(max(5.6, 3.4 * len(panels) + 1.6), 3.8, len(panels), sharex=True, sharey=True)
    for axis, (name, members) in zip(axes, panels, strict=True):
        for series in _lines(members, "slots", _hit_percent, rows):
            _draw(axis, series, " (bound)" if series.label.startswith(BOUND) else "")
        axis.set_title(name if len(panels) > 1 else "")
    return _of_hits(figure, axes, title)


def curves_figure(rows: Sequence[Row], title: str) -> Figure:
    """Hit rate against slots, a row for each size and a line for each policy; a panel for each number of indexes."""
    blocks = sorted({int(row["nblocks"]) for row in rows})
    figure, axes = new_figure(max(5.6, 3.4 * len(blocks) + 1.6), 3.8, len(blocks), sharey=True)
    for axis, count in zip(axes, blocks, strict=True):
        for series in _lines([row for row in rows if row["nblocks"] == count], "slots", _rate, rows):
            series.look["marker"] = None
            _draw(axis, series)
        axis.set_title(f"N = {count} indexes" if len(blocks) > 1 else "")
    return _of_hits(figure, axes, title)


def _of_hits(figure: Figure, axes: Sequence[Axes], title: str) -> Figure:
    """With what stands around panels of hit rates against slots."""
    for axis in axes:
        axis.set_ylim(0, 100)
        _whole_ticks(axis)
    axes[0].set_ylabel("hits, % of all expert calls")
    figure.supxlabel("expert slots on the device (N × M)", fontsize="medium")
    _legend(figure, axes)
    _title(figure, title)
    return figure


def _draw(axis: Axes, series: Series, note: str = "") -> None:
    """A line, and around it a band of the standard deviation over several traces."""
    axis.plot(series.x, series.y, label=series.label + note, **series.look)
    if any(series.spread):
        low, high = np.subtract(series.y, series.spread), np.add(series.y, series.spread)
        axis.fill_between(series.x, low, high, color=series.look["color"], alpha=0.15, linewidth=0)


def _whole_ticks(axis: Axes) -> None:
    """Slots, layers and steps are counted."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))


def _hit_percent(row: Row) -> tuple[float, float]:
    """And its deviation. Of a bound what it bounds: with a quota that is more than its own schedule hits."""
    spread = 100 * float(row.get("hit_rate_stdev", 0))
    if row["policy"] == BOUND and row.get("upper_bound"):
        return 100 * float(row["upper_bound"]) / float(row["calls"]), spread
    if spread:
        return 100 * float(row["hit_rate"]), spread
    return 100 * float(row["hits"]) / float(row["calls"]), 0.0


def _rate(row: Row) -> tuple[float, float]:
    return 100 * float(row["hit_rate"]), 100 * float(row.get("hit_rate_stdev", 0))


def _speed(row: Row) -> tuple[float, float]:
    return float(row["tokens_per_second"]), float(row.get("tokens_per_second_stdev", 0))


def _lines(
    rows: Sequence[Row], x: str, y: Callable[[Row], tuple[float, float]], among: Sequence[Row] = ()
) -> list[Series]:
    """A line for each policy, and for each other parameter that varies; the bound last, so that it lies on top.

    among: the rows of all panels, so that a line is called and looks the same in each.
    """
    among = among or rows
    parameters = ("admission", "prefetch", "mapping", "quota", "delay")
    varied = [name for name in parameters if len({str(row.get(name)) for row in among}) > 1]

    def label_of(row: Row) -> str:
        names = [name for name in varied if name not in parameters[:2] or not _knows_the_future(row["policy"])]
        return ", ".join([str(row["policy"]), *(_word(name, row.get(name)) for name in names)])

    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["policy"] == BOUND, row["policy"] in STATIC)):
        groups.setdefault(label_of(row), []).append(row)
    causal = [label for label in dict.fromkeys(map(label_of, among)) if not _knows_the_future(label)]
    lines = []
    for label, members in groups.items():
        points = sorted((float(row[x]), *y(row)) for row in members)
        at, values, spread = (list(part) for part in zip(*points, strict=True))
        lines.append(Series(label, at, values, spread, _look(label, causal)))
    return lines


def _knows_the_future(label: str) -> bool:
    return label.startswith((BOUND, "Belady", *STATIC))


def _word(name: str, value: Any) -> str:
    return str(value) if name in ("admission", "mapping") else f"{name} {'none' if value in (None, '') else value}"


def _look(label: str, causal: Sequence[str]) -> dict[str, Any]:
    """Colour and marker together tell lines apart; what knows the future is black or grey and broken."""
    if label.startswith(BOUND):
        return {"color": BLACK, "linestyle": "--"}
    if label.startswith("Belady"):
        return {"color": BLACK, "linestyle": ":", "linewidth": 1.2}
    if label.startswith(STATIC):
        return {"color": GREY, "linestyle": "-." if label.startswith(STATIC[0]) else (0, (1, 1)), "linewidth": 1.2}
    at = list(causal).index(label)
    filled = "white" if at >= len(COLOURS) else COLOURS[at % len(COLOURS)]
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "markerfacecolor": filled}


def _title(figure: Figure, title: str) -> None:
    """Bold lines above the panels, none longer than the figure is wide."""
    longest = int(11 * figure.get_figwidth())  # characters of this size
    lines = [part for line in title.splitlines() for part in wrap(line, longest)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", weight="bold")


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Beside the panels, each line once; the figure grows where there are many."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.set_figheight(max(figure.get_figheight(), LEGEND_LINE * (len(entries) + 2)))
    figure.legend(entries.values(), entries.keys(), loc="outside right center")


def speed_figure(rows: Sequence[Row], title: str) -> Figure:
    """Predicted tokens a second against N x M, a panel for each number of slots that several shapes share."""
    shapes: dict[int, set[tuple[int, int]]] = {}
    for row in rows:
        shapes.setdefault(int(row["slots"]), set()).add((int(row["nblocks"]), int(row["nways"])))
    shared = {slots: sorted(found) for slots, found in sorted(shapes.items()) if len(found) > 1}
    if not shared:
        shared = {0: sorted({shape for found in shapes.values() for shape in found})}
    figure, axes = new_figure(max(5.6, 3.0 * len(shared) + 1.8), 3.8, len(shared), sharey=True)
    for axis, (slots, found) in zip(axes, shared.items(), strict=True):
        members = [{**row, "at": found.index(place)} for row in rows if (place := _shape(row)) in found]
        for series in _lines(members, "at", _speed):
            _draw(axis, series)
        axis.axhline(float(members[0]["cpu_tokens_per_second"]), color=BLACK, linewidth=0.8, label="CPU alone")
        axis.set_xticks(range(len(found)), [f"{n}×{m}" for n, m in found])
        axis.set_xlim(-0.4, len(found) - 0.6)
        axis.set(xlabel="indexes × ways (N × M)", title=f"{slots} slots" if slots else "")
    axes[0].set_ylabel("predicted speed, tokens/s")
    axes[0].set_ylim(bottom=0)
    _legend(figure, axes)
    _title(figure, title)
    return figure


def _shape(row: Row) -> tuple[int, int]:
    return int(row["nblocks"]), int(row["nways"])


def layers_figure(shares: Reals, rows: Sequence[str], columns: tuple[str, float], row_axis: str, title: str) -> Figure:
    """A heat map of hit rates. shares: [rows, columns], 0 to 1, NaN where nothing was called; columns: name, and the
    number that one of them stands for.
    """
    name, unit = columns
    figure, (axis,) = new_figure(7.2, max(2.4, 0.18 * len(rows) + 1.3))
    extent = (0.0, shares.shape[1] * unit, len(rows) - 0.5, -0.5)
    image = axis.imshow(
        100 * shares, aspect="auto", cmap="cividis", vmin=0, vmax=100, extent=extent, interpolation="nearest"
    )
    every = -(-len(rows) // 32)
    axis.set_yticks(range(0, len(rows), every), rows[::every])
    axis.grid(visible=False)
    axis.set(xlabel=name, ylabel=row_axis)
    if unit == 1 and shares.shape[1] <= 64:
        every = max(1, shares.shape[1] // 16)
        ticks = range(0, shares.shape[1], every)
        axis.set_xticks([0.5 + at for at in ticks], list(map(str, ticks)))
    else:
        _whole_ticks(axis)
    figure.colorbar(image, ax=axis, label="hits, % of expert calls", pad=0.02)
    _title(figure, title)
    return figure


def binned(sums: Reals, maximum: int = _CELLS) -> tuple[Reals, int]:
    """[rows, columns] added up in runs of columns so that at most `maximum` are left, and the length of a run."""
    run = -(-sums.shape[1] // maximum)
    return np.add.reduceat(sums, np.arange(0, sums.shape[1], run), axis=1), run


def reuse_figure(reuse: Reuse, title: str) -> Figure:
    """Reuse by distance in tokens, by layer, and of expert numbers from layer to layer."""
    figure, (near, depth, across) = new_figure(10.2, 3.3, 3, sharey=True)
    distance = np.arange(1, len(reuse.tokens) + 1)
    for shares, label, colour, marker in (
        (reuse.window, "by any of the last d tokens", COLOURS[1], "s"),
        (reuse.tokens, "by the token d before", COLOURS[0], "o"),
    ):
        low, middle, high = 100 * shares.min(axis=1), 100 * shares.mean(axis=1), 100 * shares.max(axis=1)
        near.plot(distance, middle, label=label, color=colour, marker=marker)
        near.fill_between(distance, low, high, color=colour, alpha=0.15, linewidth=0)
    near.set(xlabel="distance d, tokens", ylabel="experts chosen before, %", title="between tokens (band: layers)")
    for axis in (near, depth, across):
        _whole_ticks(axis)
    layers = np.arange(reuse.tokens.shape[1])
    depth.plot(layers, 100 * reuse.tokens[0], color=COLOURS[0], marker="o", label="experts of the token before")
    depth.plot(layers, 100 * reuse.same_sets, color=COLOURS[2], marker="D", label="whole sets the same")
    depth.set(xlabel="MoE layer", title="between consecutive tokens")
    across.plot(layers[1:], 100 * reuse.layers, color=COLOURS[3], marker="^", label="numbers of the layer before")
    across.set(xlabel="MoE layer", title="between consecutive layers")
    for axis in (near, depth, across):
        axis.axhline(100 * reuse.chance, color=GREY, linestyle="--", linewidth=1, label="chance")
        axis.set_ylim(0, 100)
        axis.legend(loc="best", framealpha=0.8)
    _title(figure, title)
    return figure


def breakdown_figure(parts: Mapping[str, Reals], beside: Mapping[str, Reals], title: str) -> Figure:
    """Times of decoding steps. parts: ms of each step, of the threads, adding up to its time; beside: of the device, at
    the same time.
    """
    figure, (run, mean) = new_figure(9.2, 3.6, 2, width_ratios=[3, 2])
    stacked, length = binned(np.array(list(parts.values())))
    full = np.minimum(length, len(next(iter(parts.values()))) - length * np.arange(stacked.shape[1]))
    colours = {name: PART_COLOURS[at % len(PART_COLOURS)] for at, name in enumerate([*parts, *beside])}
    run.stackplot(
        length * np.arange(stacked.shape[1]), stacked / full, colors=[colours[name] for name in parts], linewidth=0
    )
    run.set(xlabel="decoding step", ylabel="time, ms", title="threads, step by step")
    run.margins(x=0)
    _whole_ticks(run)
    _mean_bars(mean, {"threads": parts, "device": beside} if beside else {"threads": parts}, colours)
    figure.legend(*mean.get_legend_handles_labels(), loc="outside right center")
    _title(figure, title)
    return figure


# Twelve that neighbours keep apart: Okabe and Ito, then darker and lighter ones of the same hues.
PART_COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#999999",
    "#004C77",
    "#8A5A00",
    "#66C9AE",
    "#7A3E63",
)


def _ink(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _mean_bars(axis: Axes, bars: Mapping[str, Mapping[str, Reals]], colours: Mapping[str, str]) -> None:
    """A stacked bar each of mean times; parts that are wide enough say their share of the first bar."""
    whole = sum(float(times.mean()) for times in next(iter(bars.values())).values())
    axis.set_yticks(range(len(bars)), list(bars))
    for at, parts in enumerate(bars.values()):
        left = 0.0
        for part, times in parts.items():
            width = float(times.mean())
            axis.barh(at, width, left=left, color=colours[part], label=f"{part}  {width:.3g} ms", height=0.5)
            if width > 0.12 * whole:
                axis.text(
                    left + width / 2, at, f"{width / whole:.0%}", ha="center", va="center", color=_ink(colours[part])
                )
            left += width
    axis.set(
        xlabel="mean time of a step, ms",
        title="means of all steps",
    )
    axis.grid(axis="y", visible=False)
    axis.invert_yaxis()
