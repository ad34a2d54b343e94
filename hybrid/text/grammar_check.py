"""Grammars as the compiler takes them, tried in a process of their own within limits of time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hybrid.core import Grammar
from hybrid.errors import RequestError

_PROGRAM = Path(__file__).with_name("grammar_process.py")
SECONDS, _PATIENCE, _MEMORY = 2, 20, 1 << 30
_MAX_DEPTH, _MAX_CHOICES = 64, 4096
_MAX_LENGTH = {"json": 1 << 18, "regex": 1 << 13, "choice": 1 << 16, "lark": 1 << 16, "gbnf": 1 << 16}
# Models that are free to write white space may go on with it for ever.
_JSON_OPTIONS = {"whitespace_pattern": "[ \\t\\r\\n]{0,40}", "coerce_one_of": True}
_NAMES = {"json": "JSON schema", "regex": "regular expression", "choice": "list of choices"}

Part = dict[str, Any]


def part_of(grammar: Grammar) -> Part:
    """A grammar as a part of what the compiler takes; its size and depth are checked. Raises RequestError."""
    if not isinstance(grammar, Grammar) or grammar.kind not in _MAX_LENGTH or not isinstance(grammar.source, str):
        raise RequestError(f"grammar is {grammar!r:.80}; it must be a hybrid.Grammar, or None")
    what, most = _NAMES.get(grammar.kind, "grammar"), _MAX_LENGTH[grammar.kind]
    if len(grammar.source) > most:
        raise RequestError(f"the {what} has {len(grammar.source)} characters; at most {most} are allowed")
    if grammar.kind == "json":
        return json_part(_parsed(grammar.source, what))
    if grammar.kind == "regex":
        return {"lark_grammar": f"start: {_regex(grammar.source)}"}
    if grammar.kind == "choice":
        return {"lark_grammar": f"start: {_alternatives(_parsed(grammar.source, what))}"}
    return {"gbnf" if grammar.kind == "gbnf" else "lark_grammar": grammar.source}


def json_part(schema: Any) -> Part:
    """A JSON schema as a part. Raises RequestError where it is none, or nested too deeply."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise RequestError(f"a JSON schema must be an object, not {schema!r:.80}")
    if _depth(schema) > _MAX_DEPTH:
        raise RequestError(f"the JSON schema is nested more than {_MAX_DEPTH} deep; define its parts under $defs")
    return {"json_schema": {**schema, "x-guidance": _JSON_OPTIONS}}


def quoted(text: str) -> str:
    """A text as Lark's grammars write it."""
    return json.dumps(text, ensure_ascii=False)


def reason(text: Any) -> str:
    """What the compiler complains of, on one line; its inner state is nobody's business, and the cause comes last."""
    line = " ".join(str(text).partition("<state>")[0].split())
    if line.startswith("NoExtension"):
        return "no text satisfies it"
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-170:]}"


def tried(parts: Sequence[Part]) -> list[Part]:
    """The same, of which each compiles and none in another language than the compiler's. Raises RequestError."""
    if find_spec("llguidance") is None:
        raise RequestError("grammars need the package llguidance: pip install 'hybrid-moe[server]'")
    try:
        text = json.dumps(list(parts))
        text.encode()
    except (ValueError, RecursionError):
        raise RequestError("the grammar is no plain data, or nested too deeply") from None
    made: list[Part] = json.loads(_tried(text))
    return made


@lru_cache(maxsize=64)
def _tried(parts: str) -> str:
    """What is wrong with one is found out again each time, for errors are not kept."""
    command = [sys.executable, "-I", "-S", str(_PROGRAM), str(Path(str(_origin())).parents[1])]
    request = json.dumps({"parts": json.loads(parts), "seconds": SECONDS, "memory": _MEMORY})
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    try:
        done = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=_PATIENCE, env=kept, process_group=0
        )
        reply = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        reply = {"limit": "time, memory or depth"}
    except OSError as error:
        raise RequestError(f"the process that tries grammars cannot be started ({error.strerror})") from None
    if "parts" in reply:
        return json.dumps(reply["parts"])
    if "limit" in reply:
        raise RequestError(
            f"the grammar is too complex: compiling it takes more than {SECONDS} s, {_MEMORY >> 20} MiB or the depth "
            "that is allowed; make it simpler"
        )
    raise RequestError(f"the grammar cannot be used: {reason(reply.get('error'))}")


def _origin() -> str | None:
    spec = find_spec("llguidance")
    return spec.origin if spec else None


def _parsed(source: str, what: str) -> Any:
    try:
        return json.loads(source, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the {what} is no JSON ({' '.join(str(error).split())[:100]})") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _regex(pattern: str) -> str:
    """As Lark writes it: between slashes, on one line."""
    escaped, backslash = "", False
    for character in pattern:
        if character == "/" and not backslash:
            escaped += "\\"
        escaped += {"\n": "n" if backslash else "\\n", "\r": "r" if backslash else "\\r"}.get(character, character)
        backslash = character == "\\" and not backslash
    if not pattern or backslash:
        raise RequestError(f"the regular expression {pattern!r:.80} is empty, or ends in a single backslash")
    return f"/{escaped}/"


def _alternatives(texts: Any) -> str:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"choices must be a list of texts, none of them empty, not {texts!r:.80}")
    if len(texts) > _MAX_CHOICES:
        raise RequestError(f"there are {len(texts)} choices; at most {_MAX_CHOICES} are allowed")
    return " | ".join(map(quoted, texts))


def _depth(value: Any) -> int:
    deepest, left = 0, [(value, 1)]
    while left:
        item, depth = left.pop()
        deepest = max(deepest, depth)
        if depth <= _MAX_DEPTH:
            inner = item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else ()
            left += [(each, depth + 1) for each in inner]
    return deepest
