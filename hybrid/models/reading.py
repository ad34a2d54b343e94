"""Checked reading of config.json: every value is of the right type and range, or a `ConfigError` names it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.errors import ConfigError

_LARGEST = 1e12
_SMALLEST = 1e-15  # of numbers above 0, so that what is divided by them and their squares is finite
_LARGEST_LIMIT = 1e6
_INFINITE = {"__float__": "Infinity"}


class Fields:
    """Values of a config by name. A null counts as missing. Getters raise `ConfigError` naming the field.

    Several names for one field are alternatives (transformers renamed some): the first one present is read.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def size(
        self,
        *names: str,
        default: int | None = None,
        minimum: int = 1,
        maximum: int = 10**6,
        maximum_of: str = "",
    ) -> int:
        """An integer from `minimum` to `maximum`; `maximum_of` says what sets this maximum."""
        allowed = str(minimum) if minimum == maximum else f"an integer from {minimum} to {maximum}"
        allowed += f" ({maximum_of})" if maximum_of else ""
        name, value = self._read(names, default, allowed)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._bad(name, value, allowed)
        return value

    def optional_size(self, name: str, *, default: int | None = None, maximum: int = 10**9) -> int | None:
        """As `size`, but null means none; `default` is for a field that is missing."""
        if not self.has(name):
            return None if name in self._values else default
        return self.size(name, maximum=maximum)

    def number(self, *names: str, default: float | None = None, above: float = 0.0) -> float:
        """A number greater than `above` and no larger than any that makes sense, so that float32 holds its products."""
        allowed = f"a number above {above:g} and at most {_LARGEST:g}"
        name, value = self._read(names, default, allowed)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= _LARGEST:
            raise self._bad(name, value, allowed)
        if 0 < value < _SMALLEST:
            raise self._bad(name, value, f"a number from {_SMALLEST:g} to {_LARGEST:g}")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        name, value = self._read(names, default, "true or false")
        if not isinstance(value, bool):
            raise self._bad(name, value, "true or false")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of integers, empty when missing."""
        name, value = self._read((name,), [], "a list of integers")
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._bad(name, value, "a list of integers")
        return value

    def numbers(self, name: str) -> list[float]:
        """A list of numbers above 0."""
        allowed = f"a list of numbers above 0 and at most {_LARGEST:g}"
        name, value = self._read((name,), None, allowed)
        kinds = isinstance(value, list) and value and all(type(item) in (int, float) for item in value)
        if not kinds or not all(0 < item <= _LARGEST for item in value):
            raise self._bad(name, value, allowed)
        return [float(item) for item in value]

    def limits(self, name: str, layers: int) -> list[float]:
        """A number above 0 for every layer, 0 where it is 0 or null; further ones are of layers that are not used."""
        allowed = f"absent, or a list of a number above 0, 0 or null for each of {layers} layers"
        name, value = self._read((name,), [0.0] * layers, allowed)
        if not isinstance(value, list) or len(value) < layers or not all(map(_is_limit, value)):
            raise self._bad(name, value, allowed)
        return [float(limit or 0) for limit in value[:layers]]

    def interval(self, name: str, *, default: tuple[float, float]) -> tuple[float, float]:
        """Two numbers from 0 on, the larger last. That may be infinite, also as `transformers` 5 writes it."""
        allowed = "two numbers from 0 on, the larger last"
        name, value = self._read((name,), list(default), allowed)
        ends = [math.inf if end == _INFINITE else end for end in value] if isinstance(value, list) else []
        if len(ends) != 2 or not all(type(end) in (int, float) for end in ends):
            raise self._bad(name, value, allowed)
        if not 0 <= ends[0] <= min(ends[1], _LARGEST):
            raise self._bad(name, value, allowed)
        return float(ends[0]), float(ends[1]) if ends[1] <= _LARGEST else math.inf

    def choices(self, name: str, *, default: Sequence[str], allowed: Sequence[str]) -> list[str]:
        """A list as long as `default` of `allowed` words."""
        wanted = f"a list of {len(default)} of {', '.join(allowed)}"
        name, value = self._read((name,), list(default), wanted)
        if not isinstance(value, list) or len(value) != len(default) or not all(v in allowed for v in value):
            raise self._bad(name, value, wanted)
        return value

    def words(self, name: str, *, allowed: Sequence[str]) -> list[str]:
        """A list of `allowed` words, of any length but none."""
        wanted = f"a list of {', '.join(allowed)}"
        name, value = self._read((name,), None, wanted)
        if not isinstance(value, list) or not value or not all(word in allowed for word in value):
            raise self._bad(name, value, wanted)
        return value

    def spelled_out(self, name: str, letters: Mapping[str, str], count: int) -> Fields:
        """A copy in which a list, or a word whose letters stand for its items, has no more than `count` of them."""
        value = self._values.get(name)
        if isinstance(value, str):
            value = [letters.get(letter, letter) for letter in value[:count]]
        return Fields({**self._values, name: value[:count] if isinstance(value, list) else value}, self._prefix)

    def choice(self, *names: str, default: str, allowed: Sequence[str]) -> str:
        name, value = self._read(names, default, "")
        if value not in allowed:
            raise self._bad(name, value, f"one of the supported {', '.join(allowed)}")
        return str(value)

    def group(self, *names: str) -> Fields:
        """A nested object, empty when missing."""
        name, value = self._read(names, {}, "an object")
        if not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values()):
            raise self._bad(name, value, "an object without nested objects")
        return Fields(value, f"{self._prefix}{name}.")

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def says(self, name: str, word: str) -> bool:
        """Whether it is this word."""
        return bool(self._values.get(name) == word)

    def is_null(self, name: str) -> bool:
        """Whether it says null, which is not the same as missing where a family has a number of its own."""
        return name in self._values and self._values[name] is None

    def is_zero(self, name: str) -> bool:
        return self.has(name) and type(self._values[name]) in (int, float) and self._values[name] == 0

    def refuse(self, *names: str, neutral: Any = None) -> None:
        """Raise unless each field is missing or `neutral`: the family has no meaning for other values."""
        for name in names:
            if self.has(name) and self._values[name] != neutral:
                raise self._bad(name, self._values[name], "absent" if neutral is None else f"absent or {neutral}")

    def _read(self, names: Sequence[str], default: Any, allowed: str) -> tuple[str, Any]:
        name = next((name for name in names if self.has(name)), None)
        if name is not None:
            return name, self._values[name]
        if default is None:
            raise ConfigError(
                f"config.json: {self._prefix}{names[0]} is missing; it must be {allowed}: "
                "take the complete config.json of the model"
            )
        return names[0], default

    def _bad(self, name: str, value: Any, allowed: str) -> ConfigError:
        return ConfigError(
            f"config.json: {self._prefix}{name} is {reprlib.repr(value)}; it must be {allowed}: "
            "correct it, or take a checkpoint that has it so"
        )


def _is_limit(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= _LARGEST_LIMIT)


def with_words(config: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    """The configuration with fields by other words, unless it has them by these too."""
    renamed = {new: config[old] for old, new in words.items() if old in config and new not in config}
    return {name: value for name, value in config.items() if name not in words} | renamed
