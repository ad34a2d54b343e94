"""Tables of a TOML file as dataclasses: a key that is unknown, missing or of another type is one line that names it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from hybrid.errors import ConfigError
from hybrid.files import Reading, read_file

T = TypeVar("T")
FILES = Reading(1 << 20, "give a TOML file; `hybrid experiment new FILE` writes one to begin with")
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError for what is no file, or no TOML, with the line."""
    try:
        return tomllib.loads(read_file(path, FILES).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: is no TOML ({str(error) or 'nested too deep'}); correct it") from None


def from_table(kind: type[T], table: Any, where: str) -> T:
    """A dataclass of the keys of a table. where: names the table in errors, as "x.toml: [[caches]] 2".

    Fields are texts, numbers, truths, or tuples of these, which are arrays. Raises ConfigError.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is {table!r:.80}; it must be a table of keys and values")
    hints, known = get_type_hints(kind), [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [key for key in table if key not in known]:
        raise ConfigError(f"{where} has no key {unknown[0]!r:.80}; allowed: {', '.join(known)}")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING and field.name not in table:
            raise ConfigError(f"{where} needs the key {field.name!r}, {_words(_kinds(hints[field.name]))}")
    return kind(**{key: _value(hints[key], value, f"{where}, {key}") for key, value in table.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if _item(hint) is None:
        return _scalar(_kinds(hint), value, where)
    if not isinstance(value, list):
        raise ConfigError(f"{where} is {value!r:.80}; it must be an array, in brackets")
    return tuple(_scalar(_kinds(hint), item, where) for item in value)


def _scalar(kinds: tuple[type, ...], value: Any, where: str) -> Any:
    if type(value) in kinds:
        return value
    if type(value) is int and float in kinds:
        return float(value)
    raise ConfigError(f"{where} has {value!r:.80}; it must be {_words(kinds)}")


def _kinds(hint: Any) -> tuple[type, ...]:
    """The types of a value, or of the items of an array."""
    return tuple(part for part in _parts(_item(hint) or hint) if part is not type(None))


def _item(hint: Any) -> Any:
    """What an array holds; None: the value is none."""
    return next((get_args(part)[0] for part in _parts(hint) if get_origin(part) is tuple), None)


def _parts(hint: Any) -> tuple[Any, ...]:
    """Of a union."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _words(kinds: tuple[type, ...]) -> str:
    return " or ".join(_WORDS[kind] for kind in kinds)
