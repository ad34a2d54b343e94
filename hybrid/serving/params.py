"""What callers say of sampling, checked and made plain: Python's own numbers, tuples of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from hybrid.core import Grammar, SamplingParams
from hybrid.errors import RequestError
from hybrid.settings import Setting, settings_of

_LAST_TOKEN = 2**31 - 1


def check_params(params: SamplingParams) -> SamplingParams:
    """The same with plain values: numpy's scalars become numbers, one text a tuple. Raises RequestError naming the
    first field that is out of range, its value and the range.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
    values = {setting.field: _plain(setting, setting.of(params)) for setting in settings_of(SamplingParams)}
    if params.logits_processor is not None and not callable(params.logits_processor):
        raise RequestError(f"logits_processor is {_shown(params.logits_processor)}; it must be a function, or None")
    if params.grammar is not None and not isinstance(params.grammar, Grammar):
        raise RequestError(f"grammar is {_shown(params.grammar)}; it must be a hybrid.Grammar, or None")
    plain = replace(params, **values)
    if plain.max_tokens is not None and plain.min_tokens > plain.max_tokens:
        raise RequestError(f"min_tokens is {plain.min_tokens}, which is more than max_tokens, {plain.max_tokens}")
    return plain


def _plain(setting: Setting, value: Any) -> Any:
    if value is None and setting.optional:
        return None
    plain = _PLAIN[setting.kind](setting, value)
    if plain is None:
        raise RequestError(f"{setting.field} is {_shown(value)}; it must be {_allowed(setting)}")
    return plain


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # a number of more digits than Python writes, or a class of somebody's own
        return f"a value of type {type(value).__name__} that cannot be written"


def _allowed(setting: Setting) -> str:
    if setting.kind is int:
        return f"a whole number of at least {setting.minimum or 0:g}{_at_most(setting)}"
    if setting.kind is float:
        return f"a number {'above' if setting.above else 'at least'} {setting.minimum:g}{_at_most(setting)}"
    if setting.kind is Mapping:
        return f"a dict of token ids with a number from {setting.minimum:g} to {setting.maximum:g} each"
    if setting.kind is tuple:
        return "a list of token ids" if setting.item is int else "a string or a list of strings, none of them empty"
    return "True or False"


def _at_most(setting: Setting) -> str:
    return "" if setting.maximum is None else f" and at most {setting.maximum:g}"


def _whole(setting: Setting, value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    number = int(value)
    return number if number >= (setting.minimum or 0) and number <= (setting.maximum or number) else None


def _real(setting: Setting, value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real) or not setting.within(value):  # type: ignore[arg-type]
        return None
    return float(value)


def _truth(setting: Setting, value: Any) -> bool | None:
    return bool(value) if isinstance(value, (bool, np.bool_)) else None


def _several(setting: Setting, value: Any) -> tuple[Any, ...] | None:
    if setting.item is int:
        values = value.tolist() if isinstance(value, np.ndarray) else value
        right = isinstance(values, (tuple, list, set, frozenset)) and all(map(_is_token, values))
        return tuple(int(token) for token in values) if right else None
    texts = (value,) if isinstance(value, str) else value
    right = isinstance(texts, (tuple, list)) and all(isinstance(text, str) and text for text in texts)
    return tuple(texts) if right else None


def _table(setting: Setting, value: Any) -> dict[int, float] | None:
    if not isinstance(value, Mapping) or not all(map(_is_token, value)):
        return None
    numbers = {int(token): _real(setting, number) for token, number in value.items()}
    return {token: number for token, number in numbers.items() if number is not None} if _all(numbers) else None


def _all(numbers: Mapping[int, float | None]) -> bool:
    return all(number is not None for number in numbers.values())


def _is_token(token: Any) -> bool:
    return not isinstance(token, bool) and isinstance(token, Integral) and 0 <= int(token) <= _LAST_TOKEN


_PLAIN: dict[type, Callable[[Setting, Any], Any]] = {
    int: _whole,
    float: _real,
    bool: _truth,
    tuple: _several,
    Mapping: _table,
}
