"""What a setting is. Each is declared once: a field of a dataclass, with what flags, environment and checks must know.

    threads: int | None = setting(None, "Threads that compute.", minimum=1, maximum=1024)

The words after the help are attributes of `Setting`. `hybrid.core`, which imports nothing of the project, gives them as
`metadata` of its fields. A dataclass may say what holds for all its fields: `PREFIX` of their names ("cache_"), `GROUP`
of their flags, and `COMMAND` if they are options of one command alone.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from hybrid.errors import ConfigError, HybridError

T = TypeVar("T")
TRUTHS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
DEFAULT, ENVIRONMENT, FLAG = "default", "environment", "flag"  # where a value came from


def setting(default: T, help: str, **words: Any) -> T:
    """A field that is a setting. words: attributes of `Setting`."""
    return field(default=default, metadata={"help": help, **words})


def required(help: str, **words: Any) -> Any:
    """A setting without a default: its value is MISSING until it is given."""
    return field(metadata={"help": help, **words})


@dataclass(frozen=True)
class Setting:
    """A declared field. What its flag and its variable are called follows from `name`, which follows from the field."""

    owner: type  # the dataclass
    path: tuple[str, ...]  # from the dataclass that was asked for: ("threads",), ("cache", "nblocks")
    kind: type  # int, float, bool, str, Path, or tuple: several texts
    hint: Any  # the whole type
    default: Any
    help: str
    name: str = ""  # "cache_nblocks": --cache-nblocks, HYBRID_CACHE_NBLOCKS
    group: str = ""  # its place in --help
    flag: bool = True  # False: there is none
    short: str = ""  # "-p"
    negatable: bool = False  # --x/--no-x
    shown: str = ""  # in place of the default
    metavar: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: bool = False  # the minimum itself is too little
    choices: tuple[str, ...] | Callable[[], Iterable[str]] = ()  # a function where only another package knows them
    words: tuple[str, ...] = ()  # allowed in place of a number
    accepts: Callable[[Any], bool] | None = None  # a rule of its own, which `allowed` puts into words
    allowed: str = ""
    secret: bool = False  # its value is shown to nobody
    late: bool = False  # its variable counts only for its default, and is read where that is given a meaning

    @property
    def field(self) -> str:
        return self.path[-1]

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.hint)

    @property
    def hint_text(self) -> str:
        """Type and default, for people."""
        kind = getattr(self.hint, "__name__", None) if isinstance(self.hint, type) else None
        name = kind or str(self.hint).replace("pathlib.", "")
        return name if self.default is MISSING else f"{name} = {self.shown or repr(self.default)}"

    @property
    def item(self) -> type:
        """Of a tuple: what it holds."""
        return cast(type, next(iter(get_args(self.hint)), str))

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        command = getattr(self.owner, "COMMAND", "")
        return f"HYBRID_{f'{command}_' if command else ''}{self.name}".upper()

    @property
    def label(self) -> str:
        """How an error names it."""
        return self.option if self.flag else f"{self.owner.__name__}.{self.field}"

    def of(self, chosen: Any) -> Any:
        """Its value in an instance of the outermost dataclass."""
        for name in self.path:
            chosen = getattr(chosen, name)
        return chosen

    def within(self, number: float) -> bool:
        """Whether a number is neither below the minimum nor above the maximum. False for NaN."""
        minimum = -math.inf if self.minimum is None else self.minimum
        maximum = math.inf if self.maximum is None else self.maximum
        return minimum <= number <= maximum and not (self.above and number == minimum)

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to be said after its name; None if it is allowed."""
        if value is self.default or (value is None and self.optional) or (type(value) is str and value in self.words):
            return None
        return _PROBLEMS[self.kind](self, value)

    def parse(self, text: str) -> Any:
        """The value that a variable's text means, whose range is not checked. Raises ConfigError."""
        try:
            if text in self.words:
                return text
            return parse_wholes(text) if self.kind is tuple and self.item is int else _PARSERS[self.kind](text)
        except (ValueError, KeyError, RuntimeError):
            must = " or ".join([*self.words, _MEANT[self.kind](self)])
            raise ConfigError(f"{self.variable} is {text!r:.80}; it must be {must}, or unset it") from None


@cache
def settings_of(kind: type) -> tuple[Setting, ...]:
    """The settings that a dataclass declares, those of its parts too, in the order of its fields."""
    found: list[Setting] = []
    hints = get_type_hints(kind)
    for item in fields(kind):
        if item.metadata:
            made = item.default if item.default_factory is MISSING else item.default_factory()
            found.append(_declared(kind, item.name, hints[item.name], made, item.metadata))
        elif is_dataclass(hints[item.name]):
            inner = settings_of(cast(type, hints[item.name]))
            found += [replace(part, path=(item.name, *part.path)) for part in inner]
    return tuple(found)


def _declared(kind: type, name: str, hint: Any, default: Any, words: Mapping[str, Any]) -> Setting:
    full = words.get("name", getattr(kind, "PREFIX", "") + name)
    group = words.get("group", getattr(kind, "GROUP", ""))
    return Setting(kind, (name,), _plain(hint), hint, default, **{**words, "name": full, "group": group})


def _plain(hint: Any) -> type:
    """int of `int | None`, tuple of `tuple[str, ...]`; of several the first."""
    if get_origin(hint) in (Union, UnionType):
        hint = get_args(hint)[0]
    return cast(type, get_origin(hint) or hint)


@cache
def parts_of(kind: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses of settings."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind) if not f.metadata and is_dataclass(hints[f.name])}


def complete(chosen: Any) -> None:
    """For `__post_init__` of a frozen dataclass of settings: a path may be given as a text, a part as a mapping of its
    fields. Raises ConfigError for a field that a part does not have.
    """
    kind: type = type(chosen)
    for name, part in parts_of(kind).items():
        if isinstance(value := getattr(chosen, name), Mapping):
            known = [item.name for item in fields(part)]
            if unknown := [key for key in value if key not in known]:
                raise ConfigError(f"{name} has no setting {unknown[0]!r:.80}; allowed: {', '.join(known)}")
            object.__setattr__(chosen, name, part(**value))
    for item in settings_of(kind):
        if item.kind is Path and len(item.path) == 1 and isinstance(path := item.of(chosen), str | os.PathLike):
            object.__setattr__(chosen, item.field, _PARSERS[Path](os.fspath(path)))


def describe(kind: type[T]) -> type[T]:
    """A decorator that lists the settings of a dataclass in its docstring."""
    declared: type = kind
    lines = [f"    {'.'.join(item.path)}: {item.hint_text}; {item.help}" for item in settings_of(declared)]
    kind.__doc__ = "\n".join([(kind.__doc__ or "").rstrip(), "", "    Settings, with their defaults:", "", *lines])
    return kind


def check_settings(chosen: Any) -> None:
    """Raise ConfigError naming the first value of a dataclass that its declaration does not allow."""
    kind: type = type(chosen)
    for name, part in parts_of(kind).items():
        if not isinstance(getattr(chosen, name), part):
            raise ConfigError(f"{name} {getattr(chosen, name)!r:.80} is not a {part.__name__}; give one")
    for setting in settings_of(kind):
        if problem := setting.problem(setting.of(chosen)):
            raise ConfigError(f"{setting.label} {problem}")


def as_utf8(value: Any) -> Any:
    """A text of the command line or the environment as UTF-8, or a list of them, where the locale is another."""
    if isinstance(value, list):
        return [as_utf8(part) for part in value]
    if not isinstance(value, str) or value.isascii():
        return value
    try:
        return os.fsencode(value).decode()
    except UnicodeError:
        return value


@dataclass(frozen=True)
class Choice:
    """The value of a setting, and where it came from."""

    setting: Setting
    value: Any
    source: str = DEFAULT

    @property
    def given_as(self) -> str:
        """The flag or the variable; empty for a default."""
        no = self.setting.negatable and self.value is False
        flag = f"--no-{self.setting.option[2:]}" if no else self.setting.option
        return {FLAG: flag, ENVIRONMENT: self.setting.variable}.get(self.source, "")


def choose(
    settings: Iterable[Setting], given: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> list[Choice]:
    """A value for each: what its flag gives (by name), else its variable unless it is empty, else its default."""
    return [_choice(setting, given or {}, environment) for setting in settings]


def _choice(setting: Setting, given: Mapping[str, Any], environment: Mapping[str, str]) -> Choice:
    if setting.name in given:
        value = given[setting.name]
        return Choice(setting, tuple(value) if setting.kind is tuple else value, FLAG)
    if not setting.late and (text := environment.get(setting.variable)):
        return Choice(setting, setting.parse(as_utf8(text)), ENVIRONMENT)
    return Choice(setting, setting.default)


def build(kind: type[T], choices: Sequence[Choice]) -> T:
    """An instance of a dataclass from the choices that are of its settings, and of those of its parts."""
    declared: type = kind
    values = {choice.setting.field: choice.value for choice in choices if choice.setting.owner is kind}
    return kind(**values, **{name: build(part, choices) for name, part in parts_of(declared).items()})


@contextmanager
def named_as_given(choices: Sequence[Choice]) -> Iterator[None]:
    """Errors name a value that is from the environment by its variable, in place of its flag."""
    try:
        yield
    except HybridError as error:
        text = str(error)
        for choice in choices:
            if choice.source == ENVIRONMENT:
                names = rf"^{choice.setting.name}(?= )|{choice.setting.option}(?![\w-])"
                text = re.sub(names, choice.setting.variable, text)
        error.args = (text,)
        raise


def _int_problem(setting: Setting, value: Any) -> str | None:
    bounds = _bounds(setting)
    if type(value) is not int:
        return f"{value!r:.80} is not an int; it must be one{bounds and f', {bounds}'}"
    return None if setting.within(value) else f"{value} is out of range; it must be {bounds}{setting.allowed}"


def _bounds(setting: Setting) -> str:
    if setting.maximum is not None:
        return f"from {setting.minimum} to {setting.maximum}"
    return "" if setting.minimum is None else f"at least {setting.minimum}"


def _float_problem(setting: Setting, value: Any) -> str | None:
    right = type(value) in (int, float) and math.isfinite(value) and setting.within(value)
    return None if right else f"{value!r:.80} is out of range; give {_number(setting)}"


def _number(setting: Setting) -> str:
    if setting.allowed:
        return setting.allowed
    lower_bound = "" if setting.minimum is None else f" {'above' if setting.above else 'from'} {setting.minimum:g}"
    return f"a number{lower_bound}" + ("" if setting.maximum is None else f" to {setting.maximum:g}")


def _bool_problem(setting: Setting, value: Any) -> str | None:
    rest = ", False or None" if setting.optional else " or False"
    return None if type(value) is bool else f"{value!r:.80} is not a truth value; use True{rest}"


def _text_problem(setting: Setting, value: Any) -> str | None:
    if setting.accepts or setting.choices:
        names = tuple(setting.choices() if callable(setting.choices) else setting.choices)
        allowed = setting.allowed or ", ".join(names)
        return None if _known(setting, names, value) else f"{value!r:.80} is unknown; allowed: {allowed}"
    return (
        None if isinstance(value, str) else f"{value!r:.80} is not a text{setting.allowed and f'; {setting.allowed}'}"
    )


def _known(setting: Setting, names: tuple[str, ...], value: Any) -> bool:
    if not isinstance(value, str):
        return False
    if setting.accepts:
        return setting.accepts(value)
    return value in names


def _path_problem(setting: Setting, value: Any) -> str | None:
    return None if isinstance(value, str | os.PathLike) else f"{value!r:.80} is not a path; give one, or a text"


def _texts_problem(setting: Setting, value: Any) -> str | None:
    if setting.item is int:
        right = isinstance(value, tuple | list) and all(type(number) is int for number in value)
        return None if right else f"{value!r:.80} is not a tuple of whole numbers; give one"
    right = isinstance(value, tuple | list) and all(isinstance(text, str) for text in value)
    return None if right else f"{value!r:.80} is not a tuple of texts; give one"


def _parse_texts(text: str) -> tuple[str, ...]:
    """One text, or a JSON list of them."""
    if not text.startswith("["):
        return (text,)
    texts = json.loads(text)
    if not all(isinstance(part, str) for part in texts):
        raise ValueError
    return tuple(texts)


def parse_wholes(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between, in brackets or without."""
    return tuple(int(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",") if part.strip())


def parse_numbers(text: str) -> dict[int, float]:
    """A JSON object whose keys are whole numbers. Raises ValueError."""
    numbers = json.loads(text)
    if not isinstance(numbers, dict) or not all(type(number) in (int, float) for number in numbers.values()):
        raise ValueError
    return {int(key): float(number) for key, number in numbers.items()}


def _numbers_problem(setting: Setting, value: Any) -> str | None:
    right = isinstance(value, Mapping) and all(type(key) is int for key in value)
    if right and all(_float_problem(setting, number) is None for number in value.values()):
        return None
    return f"{value!r:.80} is not a table of token ids with {_number(setting)} each; give one"


_PROBLEMS: dict[type, Callable[[Setting, Any], str | None]] = {
    int: _int_problem,
    float: _float_problem,
    bool: _bool_problem,
    str: _text_problem,
    Path: _path_problem,
    tuple: _texts_problem,
    Mapping: _numbers_problem,
}
_PARSERS: dict[type, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda text: TRUTHS[text.strip().lower()],
    str: str,
    Path: lambda text: Path(text).expanduser(),
    tuple: _parse_texts,
    Mapping: parse_numbers,
}
_MEANT: dict[type, Callable[[Setting], str]] = {
    int: lambda setting: f"a whole number{(bounds := _bounds(setting)) and f', {bounds}'}",
    float: _number,
    bool: lambda setting: f"one of {', '.join(TRUTHS)}",
    Path: lambda setting: "a path whose home directory is known",
    tuple: lambda setting: (
        "whole numbers with commas between" if setting.item is int else "a text, or a JSON list of texts"
    ),
    Mapping: lambda setting: 'a JSON object such as {"15": -100}',
}
