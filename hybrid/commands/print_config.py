"""`--print-config`: every setting of a command, its value, and where that came from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid.commands.console import show, show_json
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.settings import ENVIRONMENT, Choice, check_settings

_HIDDEN = "(hidden)"


def print_choices(choices: Sequence[Choice], chosen: Iterable[Any]) -> None:
    """A table, or one JSON object where --json or --output json is among them. chosen: the dataclasses that they make.

    Raises ConfigError for a value that is not allowed.
    """
    chosen = list(chosen)
    for part in chosen:
        check_settings(part)
    choices = [_now(choice) for choice in choices]
    as_json = any((choice.setting.name, choice.value) in (("json", True), ("output", "json")) for choice in choices)
    if as_json:
        show_json(to_json(choices))
    else:
        show("\n".join([to_text(choices), *_limit_lines(chosen)]))


def _limit_lines(chosen: list[Any]) -> list[str]:
    """What decides beside the settings of an engine: how much of this machine may be used."""
    from hybrid.machine.hardware import probe

    limits = probe().limits if any(isinstance(part, EngineConfig) for part in chosen) else ()
    return ["", *(f"limit: {limit}" for limit in limits)] if limits else []


def _now(choice: Choice) -> Choice:
    """With what the environment says of a setting whose variable is read later, in place of its default alone."""
    setting, text = choice.setting, os.environ.get(choice.setting.variable)
    if not setting.late or not text or choice.value != setting.default:
        return choice
    if problem := setting.problem(text):
        raise ConfigError(f"{setting.variable} {problem}, or unset it")
    return replace(choice, value=text, source=ENVIRONMENT)


def to_text(choices: Sequence[Choice]) -> str:
    rows = [("setting", "value", "from")]
    rows += [(choice.setting.name, _text(choice), f"{choice.source} {choice.given_as}".rstrip()) for choice in choices]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:<{first}}  {value:<{second}}  {source}" for name, value, source in rows)


def _text(choice: Choice) -> str:
    """None as the help says it."""
    if choice.setting.secret and choice.value:
        return _HIDDEN
    if choice.value is None or choice.value == ():
        return f"({choice.setting.shown})" if choice.setting.shown else "-"
    if choice.setting.kind is tuple:
        return json.dumps(choice.value, ensure_ascii=False)
    return {True: "yes", False: "no"}[choice.value] if choice.setting.kind is bool else str(choice.value)


def _data(choice: Choice) -> Any:
    if choice.setting.secret and choice.value:
        return _HIDDEN
    return str(choice.value) if isinstance(choice.value, Path) else choice.value


def to_json(choices: Sequence[Choice]) -> dict[str, Any]:
    return {
        choice.setting.name: {
            "value": _data(choice),
            "source": choice.source,
            "given_as": choice.given_as or None,
        }
        for choice in choices
    }
