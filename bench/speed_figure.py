"""Draw what `bench/compare.py` wrote: how many times as fast as llama.cpp, by test and format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.lab.figures import BLACK, COLOURS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PEER = "llama.cpp"
FORMATS = {"bf16": "bf16 beside BF16", "int8": "int8 beside Q8_0", "int4": "int4 beside Q4_0"}
HEIGHT = 0.25  # of a bar, where tests are 1 apart

app = typer.Typer(add_completion=False)


def name(result: dict[str, Any]) -> str:
    """A test in words: "decode after 4096 tokens"."""
    test = f"prompt of {result['test'][2:]} tokens" if result["test"].startswith("pp") else "decode"
    behind = f" after {result['depth']}" if result["depth"] else ""
    return test + behind + (f", {result['batch']} sequences" if result["batch"] > 1 else "")


def draw(results: Sequence[dict[str, Any]], title: str) -> Figure:
    """A group of bars for each test, a bar for each format, with both speeds beside it."""
    results = [result for result in results if result["peer"].startswith(PEER)]
    results.sort(key=lambda result: (result["test"][:2] != "pp", result["batch"], result["depth"]))
    tests = list(dict.fromkeys(map(name, results)))
    figure, (axes,) = new_figure(7.5, 0.3 + 0.75 * len(tests))
    for index, (format, label) in enumerate(FORMATS.items()):
        mine = [result for result in results if result["format"] == format]
        places = [tests.index(name(result)) + (index - 1) * HEIGHT for result in mine]
        ratios = [result["ours"] / result["theirs"] for result in mine]
        axes.barh(places, ratios, height=0.85 * HEIGHT, color=COLOURS[index], label=label)
        for place, ratio, result in zip(places, ratios, mine, strict=True):
            text = f" {ratio:.{1 + (ratio < 2)}f}x  ({result['ours']:.0f} and {result['theirs']:.0f} tokens/s)"
            axes.text(ratio, place, text, va="center", fontsize=7, color=BLACK)
    axes.axvline(1, color=BLACK, linewidth=0.8)
    axes.set_yticks(range(len(tests)), tests)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.35 * max(result["ours"] / result["theirs"] for result in results))
    axes.set_xlabel(f"tokens per second, as multiples of {PEER}'s")
    axes.legend(loc="lower right")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


@app.command()
def main(
    reports: Annotated[list[Path], typer.Argument(help="JSON files of bench/compare.py.")],
    out: Annotated[Path, typer.Option(help="The figure to write: .svg or .png.")],
    title: Annotated[str, typer.Option(help="What was measured, on what.")],
) -> None:
    """Draw the speeds of one or more reports in one figure."""
    results = [result for path in reports for result in json.loads(path.read_text())["results"]]
    styled(lambda: draw(results, title), out)


if __name__ == "__main__":
    app()
