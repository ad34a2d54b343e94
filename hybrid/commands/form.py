"""Flags for what texts must be: JSON of a schema, a regular expression, one of several texts, a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hybrid.core import Grammar
from hybrid.errors import ConfigError
from hybrid.files.json import read_json_object
from hybrid.files.reading import Reading, read_file
from hybrid.settings import setting

_SCHEMA = Reading(1 << 20, 'give a JSON schema such as {"type": "object"}', prefix="--json-schema")
_RULES = Reading(1 << 20, "give a grammar as Lark or GBNF has them", prefix="--grammar")


@dataclass(frozen=True)
class FormOptions:
    """At most one of them is given."""

    GROUP: ClassVar[str] = "sampling"

    json_schema: Path | None = setting(None, "Texts are JSON of the schema in this file.", metavar="FILE")
    regex: str | None = setting(None, "Texts match this regular expression as a whole.", metavar="PATTERN")
    choice: tuple[str, ...] = setting((), "Texts are one of these", metavar="TEXT")
    grammar: Path | None = setting(None, "Texts are what the grammar in this file says: Lark or GBNF.", metavar="FILE")

    def read(self) -> Grammar | None:
        """Raises ConfigError for files that cannot be read, and for more than one."""
        given = [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value not in (None, ())]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.json_schema:
            return Grammar.json(read_json_object(self.json_schema, _SCHEMA))
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.choice:
            return Grammar.choice(self.choice)
        return Grammar.rules(read_file(self.grammar, _RULES).decode(errors="replace")) if self.grammar else None
