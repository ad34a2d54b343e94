"""Names with wildcards for the regular expressions that name modules: these are tried without the risks of those."""

from __future__ import annotations

import re
from itertools import product

_TOKEN = re.compile(r"(?:\.|\\d|\[[\w-]+\])[*+]|\.|\\[.\-_d]|\[[\w-]+\]|[\w-]|\((?:\?:)?[\w.|\\-]+\)")
MAX_NAMES = 256


def wildcards(expression: str) -> list[str] | None:
    """Patterns for `fnmatch` of which a name matches one if the expression, an `re.match`, finds it.

    `.`, `.*`, digits, sets of characters, escaped dots, alternatives in parentheses, `^` and `$` around all are
    understood, and None is the answer to all others. What stands for one or more characters of a kind stands for any.
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
    one = {".": "?", "\\d": "[0-9]"}.get(token.rstrip("*+"), token.rstrip("*+").removeprefix("\\"))
    return ["*" if token.endswith("*") else one + "*" if token.endswith("+") else one]
