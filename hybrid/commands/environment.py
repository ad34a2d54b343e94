"""Variables of the environment that look like settings and are none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules

from hybrid.commands import __path__ as commands
from hybrid.commands.console import say
from hybrid.settings import Setting, settings_of

PREFIX = "HYBRID_"
_OF_TESTS = ("HYBRID_TEST_", "HYBRID_SANITIZE", "HYBRID_EMULATOR")


def warn_of_unknown_variables(settings: Iterable[Setting], environment: Mapping[str, str] = os.environ) -> None:
    """Say which variables mean nothing, and which may have been meant. settings: of the command that runs, looked at
    first, so that nothing else is imported where there is no such variable.
    """
    found = {name for name in environment if name.startswith(PREFIX) and not name.startswith(_OF_TESTS)}
    strange = found - {setting.variable for setting in settings}
    if not strange:
        return
    known = {setting.variable for setting in _all_settings()}
    for name in sorted(strange - known):
        words = {variable.removeprefix(PREFIX): variable for variable in known}
        near = get_close_matches(name.removeprefix(PREFIX), words, 1)
        advice = f"did you mean {words[near[0]]}?" if near else "hybrid run --print-config lists the settings"
        say(f"warning: {name} is no setting and has no effect; {advice}")


def _all_settings() -> Iterator[Setting]:
    """Those of all commands."""
    for module in iter_modules(commands, "hybrid.commands."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, type) and is_dataclass(value) and any("help" in f.metadata for f in fields(value)):
                yield from settings_of(value)
