"""Names with wildcards for the regular expressions that name modules: these are tried without the risks of those."""

from __future__ import annotations

import re
from itertools import product

_TOKEN = re.compile(r"\.\*|\\[.\-_]|[\w-]|\.|\((?:\?:)?[\w.|\\-]+\)")
MAX_NAMES = 256


def wildcards(expression: str) -> list[str] | None:
    """Patterns for `fnmatch` of which a name matches one if the expression, an `re.match`, finds it.

    `.`, `.*`, escaped dots, alternatives in parentheses, `^` and `$` around all are understood; None of all others.
    """
    body = expression.removeprefix("^")
    ends = body.endswith("$") and not body.endswith("\\$")
    body = body.removesuffix("$") if ends else body
    choices: list[list[str]] = []
    at, count = 0, 1
    while at < len(body):
        token = _TOKEN.match(body, at)
        if not token:
            return None
        choices.append(_meanings(token[0]))
        count *= len(choices[-1])
        at = token.end()
        if count > MAX_NAMES or body[at : at + 1] in ("*", "+", "?", "{"):
            return None
    return ["".join(parts) + ("" if ends else "*") for parts in product(*choices)]


def _meanings(token: str) -> list[str]:
    if token.startswith("("):
        inner = token[1:-1].removeprefix("?:")
        return [word.replace("\\", "") for word in inner.split("|")]
    return [{".*": "*", ".": "?"}.get(token, token.removeprefix("\\"))]
