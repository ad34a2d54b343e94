"""Whether a value is what a JSON schema describes, by the keywords that descriptions of this project have."""

from __future__ import annotations

import re
from typing import Any

_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
_NOTES = {"title", "description", "default", "discriminator"}


def fits(schema: Any, value: Any) -> bool:
    """Raises KeyError for a keyword that is not known here."""
    if isinstance(schema, bool):
        return schema
    return all(_KEYWORDS[key](wanted, value, schema) for key, wanted in schema.items() if key not in _NOTES)


def _is(kind: str, value: Any) -> bool:
    if kind in ("integer", "number"):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (kind == "number" or value == int(value))
    return isinstance(value, _TYPES[kind])


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _if(condition: Any, value: Any, schema: Any) -> bool:
    return fits(schema.get("then", True) if fits(condition, value) else schema.get("else", True), value)


def _properties(wanted: Any, value: Any, schema: Any) -> bool:
    return not isinstance(value, dict) or all(fits(part, value[name]) for name, part in wanted.items() if name in value)


def _others(wanted: Any, value: Any, schema: Any) -> bool:
    known = schema.get("properties", {})
    return not isinstance(value, dict) or all(fits(wanted, part) for name, part in value.items() if name not in known)


def _names(wanted: Any, value: Any, schema: Any) -> bool:
    return not isinstance(value, dict) or all(fits(wanted, name) for name in value)


def _of(*kinds: type) -> Any:
    """A comparison that says nothing of values of other types."""
    return lambda compare: (
        lambda wanted, value, schema: isinstance(value, bool) or not isinstance(value, kinds) or compare(wanted, value)
    )


_number, _text, _list, _object = _of(int, float), _of(str), _of(list), _of(dict)
_KEYWORDS: dict[str, Any] = {
    "type": lambda wanted, value, schema: any(_is(kind, value) for kind in ([wanted] if wanted in _ALL else wanted)),
    "enum": lambda wanted, value, schema: any(_same(one, value) for one in wanted),
    "const": lambda wanted, value, schema: _same(wanted, value),
    "anyOf": lambda wanted, value, schema: any(fits(one, value) for one in wanted),
    "oneOf": lambda wanted, value, schema: sum(fits(one, value) for one in wanted) == 1,
    "allOf": lambda wanted, value, schema: all(fits(one, value) for one in wanted),
    "not": lambda wanted, value, schema: not fits(wanted, value),
    "if": _if,
    "then": lambda wanted, value, schema: True,
    "else": lambda wanted, value, schema: True,
    "properties": _properties,
    "additionalProperties": _others,
    "propertyNames": _names,
    "required": _object(lambda wanted, value: all(name in value for name in wanted)),
    "maxProperties": _object(lambda wanted, value: len(value) <= wanted),
    "items": _list(lambda wanted, value: all(fits(wanted, item) for item in value)),
    "contains": _list(lambda wanted, value: any(fits(wanted, item) for item in value)),
    "minItems": _list(lambda wanted, value: len(value) >= wanted),
    "maxItems": _list(lambda wanted, value: len(value) <= wanted),
    "minLength": _text(lambda wanted, value: len(value) >= wanted),
    "maxLength": _text(lambda wanted, value: len(value) <= wanted),
    "pattern": _text(lambda wanted, value: re.search(wanted, value) is not None),
    "minimum": _number(lambda wanted, value: value >= wanted),
    "maximum": _number(lambda wanted, value: value <= wanted),
    "exclusiveMinimum": _number(lambda wanted, value: value > wanted),
}
_ALL = [*_TYPES, "integer", "number"]
