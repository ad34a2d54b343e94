"""What device, copies and threads did during a step, as a picture of bars: one lane for each, time to the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrid.lab.figures import BLACK, COLOURS, GREY, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANES = {
    "device": ("attention", "route", "join", "head"),
    "device: experts": ("hits",),
    "copies": ("copy",),
    "threads": ("older tokens", "misses", "lookup", "wait"),
}
_LANE_OF = {what: lane for lane, members in LANES.items() for what in members}
_BLUE, _RED, _GREEN, _PINK, _SKY, _ORANGE, _ = COLOURS
_COLOUR = {
    "attention": _BLUE, "route": _SKY, "join": _GREEN, "head": BLACK, "hits": _ORANGE, "copy": _RED,
    "older tokens": "#7B5EA7", "misses": _PINK, "lookup": GREY, "wait": "#DDDDDD",
}  # fmt: skip
_LEAST = 1e-6  # seconds: what is shorter is drawn so long, to be seen


@dataclass(frozen=True)
class Span:
    """Something that took from `start` to `end`, seconds of one clock."""

    what: str
    start: float
    end: float


class Timeline:
    """Keeps what an engine tells it: `engine.watch(timeline)`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __call__(self, what: str, start: float, end: float) -> None:
        self.spans.append(Span(what, start, end))

    def between(self, start: float, end: float) -> list[Span]:
        """What was going on then, cut to it and counted from its start; the longer of what begins together first."""
        met = [span for span in self.spans if span.end > start and span.start < end]
        cut = [Span(span.what, max(span.start, start) - start, min(span.end, end) - start) for span in met]
        return sorted(cut, key=lambda span: (span.start, -span.end))


def busy_seconds(spans: Sequence[Span], lane: str) -> float:
    """How long something was going on in a lane; waiting is nothing."""
    total = reached = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        if _LANE_OF[span.what] == lane and span.what != "wait":
            total += max(0.0, span.end - max(span.start, reached))
            reached = max(reached, span.end)
    return total


def timeline_figure(spans: Sequence[Span], title: str) -> Figure:
    """spans: of one step, from 0 on."""
    lanes = [lane for lane in LANES if any(_LANE_OF[span.what] == lane for span in spans)]
    figure, (axis,) = new_figure(9, 0.9 + 0.55 * len(lanes))
    for place, lane in enumerate(lanes):
        _draw(axis, [span for span in spans if _LANE_OF[span.what] == lane], place)
    axis.set_yticks(range(len(lanes)), lanes)
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds", title=title)
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=10)
    return figure


def _draw(axis: Axes, spans: Sequence[Span], place: int) -> None:
    for what in dict.fromkeys(span.what for span in spans):
        bars = [(1e3 * s.start, 1e3 * max(s.end - s.start, _LEAST)) for s in spans if s.what == what]
        axis.broken_barh(bars, (place - 0.35, 0.7), facecolors=_COLOUR[what], label=what, linewidth=0)
