"""The story plots, which are prose and therefore kept as plain text in `plots.txt`."""

from __future__ import annotations

import re
from pathlib import Path

from grammar import sections

MACROS = ("day", "went", "meet", "thanks")


def load(path: Path) -> tuple[str, ...]:
    """The plots with `<name>` references resolved."""
    named = {name: " ".join(lines) for name, lines in sections(path).items()}
    bodies = (body for name, body in named.items() if name not in MACROS)
    return tuple(re.sub(r"<(\w+)>", lambda match: named[match.group(1)], body) for body in bodies)


PLOTS = load(Path(__file__).with_name("plots.txt"))
