"""Pages of text, tables and figures in one file, from the template of the project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from hybrid.files import FileKind, output_file

ASSETS = Path(__file__).parent.parent / "assets"
PAGE = FileKind("an HTML page", lambda head: head.lstrip().lower().startswith(b"<!doctype html"))


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """words: whether a column holds words, which stand left, or numbers, which stand right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[bool]


@dataclass(frozen=True)
class Figure:
    """svg: an element that goes into the page as it is; it must be our own."""

    svg: str


@dataclass
class Section:
    """What stands under a heading; without a title, at the top of the page."""

    title: str = ""
    parts: list[Text | Table | Figure] = field(default_factory=list)


def figure_of(path: Path) -> Figure:
    """A figure that matplotlib wrote as SVG, without what stands before its element."""
    text = path.read_text(encoding="utf-8")
    return Figure(text[text.index("<svg") :])


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """All text is escaped. Raises ConfigError for a place that cannot be written."""
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("report.html").render(title=title, sections=sections)
    with output_file(path, PAGE) as file:
        file.write(text.encode())
