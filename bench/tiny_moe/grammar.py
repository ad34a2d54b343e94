"""A tiny template language: `[a|b|c]` picks one alternative (nesting allowed), `{slot}` is looked up.

Templates keep the corpus readable as prose; the clean-up step fixes what templates cannot know, namely
"a"/"an" and the capital letter at the start of a sentence.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
_START = re.compile(r'(?:^|(?<=[.!?] )|(?<=\n))("?)([a-z])')


def expand(template: str, rng: random.Random, slots: dict[str, str] | None = None) -> str:
    """Expands choices from the inside out, then slots, then tidies the result."""
    text = choose(template, rng)
    if slots:
        text = _SLOT.sub(lambda match: slots[match.group(1)], text)
    return tidy(text)


def choose(template: str, rng: random.Random) -> str:
    """Resolves the choices only."""
    while "[" in template:
        template = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)
    return template


def tidy(text: str) -> str:
    """Repairs spacing, articles and capitals."""
    text = re.sub(r" +", " ", text).strip()
    text = _ARTICLE.sub(r"\1n ", text)
    return _START.sub(lambda match: match.group(1) + match.group(2).upper(), text)


def sections(path: Path) -> dict[str, list[str]]:
    """Named sections of a text file: a line `name:`, then lines of content up to an empty line."""
    text = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    blocks = (block.strip().split("\n") for block in text.split("\n\n") if block.strip())
    return {head.rstrip(":"): lines for head, *lines in blocks}
