"""Values of a GGUF file's metadata by name: each of the right type, or a WeightsError names it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

from hybrid.errors import WeightsError
from hybrid.weights.checkpoints.gguf_files import Gguf

_LARGEST = 1 << 40


class GgufMetadata:
    """Getters take the name without that of the architecture, which most keys begin with."""

    def __init__(self, model: Gguf) -> None:
        self._model = model
        self.architecture = str(self._read("general.architecture", None, "a text", lambda value: type(value) is str))

    def size(self, name: str, default: int | None = None, maximum: int = _LARGEST) -> int:
        """An integer; of a list with one for each layer, the value that all have."""
        found = int(self._read(self._key(name), default, "an integer, the same for all layers", _is_size))
        if found > maximum:
            raise self.refuse(name, found, f"at most {maximum}")
        return found

    def layer_sizes(self, name: str, count: int, longer: bool = False) -> list[int]:
        """An integer for each of `count` layers, or one for all of them. longer: more are left out."""
        value: Any = self._model.metadata.get(self._key(name))
        found: list[Any] = value if isinstance(value, list) else [value] * count
        found = found[:count] if longer else found
        if len(found) != count or not all(map(_is_size, found)):
            raise self._bad(self._key(name), value, f"an integer, or one for each of {count} layers")
        return found

    def layer_flags(self, name: str, count: int) -> list[bool]:
        """True or false for each of `count` layers."""
        value: Any = self._model.metadata.get(self._key(name))
        if not isinstance(value, list) or len(value) != count or not all(type(item) is bool for item in value):
            raise self._bad(self._key(name), value, f"true or false for each of {count} layers")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._read(self._key(name), default, "a number", _is_number))

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._read(self._key(name), default, "true or false", lambda value: type(value) is bool))

    def text(self, name: str, default: str) -> str:
        return str(self._read(self._key(name), default, "a text", lambda value: type(value) is str))

    def is_list(self, name: str) -> bool:
        return isinstance(self._model.metadata.get(self._key(name)), list)

    def is_flags(self, name: str) -> bool:
        """Whether it is a list of true and false."""
        value = self._model.metadata.get(self._key(name))
        return isinstance(value, list) and all(type(item) is bool for item in value)

    def has(self, name: str) -> bool:
        return self._key(name) in self._model.metadata

    def has_tensors(self, prefix: str) -> bool:
        """Whether names of tensors begin so."""
        return any(name.startswith(prefix) for name in self._model.tensors)

    def refuse(self, name: str, value: Any, allowed: str) -> WeightsError:
        """The error for a value that means something which is not computed here."""
        return self._bad(self._key(name), value, allowed)

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def _read(self, key: str, default: Any, allowed: str, is_allowed: Callable[[Any], bool]) -> Any:
        value = self._model.metadata.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            raise WeightsError(
                f"{self._model.path}: its metadata lacks {key}, which must be {allowed}: fetch or make the file again"
            )
        if not is_allowed(value):
            raise self._bad(key, value, allowed)
        return value

    def _bad(self, key: str, value: Any, allowed: str) -> WeightsError:
        return WeightsError(
            f"{self._model.path}: its metadata has {key} {reprlib.repr(value)}; it must be {allowed}: "
            "take another copy of the model"
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST
