"""The tokens that open a message and a call of tools: where a chat that is written anew may go on from an older one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybrid.text.tool_parsers.dialect import Dialect


@dataclass(frozen=True)
class Openings:
    """Ids of tokens, None where a model has no such token."""

    message: int | None = None
    call: int | None = None


def choose_openings(
    template: str, specials: Mapping[str, int], added: Mapping[str, int], dialect: Dialect | None
) -> Openings:
    """message: the special token that a template writes most often, at least twice; of equals the first, as what closes
    a message comes behind. call: what opens a block of calls in this dialect, if that is a token.
    """
    counts = {token: template.count(token) for token in specials if token.strip()}
    often = [token for token, count in counts.items() if count >= 2]
    message = min(often, key=lambda token: (-counts[token], template.index(token)), default=None)
    call = next((added[mark] for mark in dialect.blocks if mark in added), None) if dialect else None
    return Openings(None if message is None else specials[message], call)
