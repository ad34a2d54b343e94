"""Markdown tables whose columns are as wide as their cells, so that a terminal shows them as a table, too."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[bool]) -> list[str]:
    """The lines of a table. words: whether a column holds words, which stand left, or numbers, which stand right."""
    widths = [max(3, *(len(row[at]) for row in (columns, *rows))) for at in range(len(columns))]
    return [*heading(columns, widths, words), *(line(cells, widths, words) for cells in rows)]


def heading(columns: Sequence[str], widths: Sequence[int], words: Sequence[bool]) -> list[str]:
    rule = ["-" * width if left else "-" * (width - 1) + ":" for width, left in zip(widths, words, strict=True)]
    return [line(columns, widths, words), line(rule, widths, words)]


def line(cells: Sequence[str], widths: Sequence[int], words: Sequence[bool]) -> str:
    parts = (
        f"{cell:<{width}}" if left else f"{cell:>{width}}"
        for cell, width, left in zip(cells, widths, words, strict=True)
    )
    return f"| {' | '.join(parts)} |"
