"""What `LLM(...)` takes: the fields of `EngineConfig`, by the same names and in the same order, and two callbacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from functools import update_wrapper
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from hybrid.config import CacheConfig, DeviceConfig, EngineConfig
from hybrid.errors import HybridError
from hybrid.settings import Choice, build, choose, parts_of, settings_of

P = ParamSpec("P")


@dataclass(frozen=True)
class Arguments(EngineConfig):
    """Only its signature is used. Paths may be texts, the parts may be left out."""

    model_path: str | Path | None = None  # type: ignore[assignment]
    _: KW_ONLY
    cache_dir: str | Path | None = None  # type: ignore[assignment]
    cache: CacheConfig | Mapping[str, Any] | None = None  # type: ignore[assignment]
    simulated: DeviceConfig | Mapping[str, Any] | None = None  # type: ignore[assignment]
    route_trace: str | Path | None = None  # type: ignore[assignment]
    progress: Callable[[str, int, int], None] | None = None
    notice: Callable[[str], None] | None = None


def signed_by(kind: Callable[P, Any]) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """A constructor with the arguments of a class, for readers of types and of signatures. It gets those that were
    given, by name. Another name is a TypeError that says which was meant.
    """
    wanted = signature(kind)

    def sign(construct: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        def signed(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
            _check_names(type(self).__name__, kwargs, wanted.parameters)
            construct(self, **wanted.bind(*args, **kwargs).arguments)

        update_wrapper(signed, construct)
        me = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
        signed.__signature__ = wanted.replace(parameters=[me, *wanted.parameters.values()])  # type: ignore[attr-defined]
        return signed

    return sign


@contextmanager
def named_as_arguments() -> Iterator[None]:
    """Errors name arguments, in place of the flags of commands: `max_seq_len`, `cache.nblocks`."""
    try:
        yield
    except HybridError as error:
        text = str(error)
        for setting in settings_of(EngineConfig):
            text = re.sub(rf"{setting.option}(?![\w-])", ".".join(setting.path), text)
        error.args = (text,)
        raise


def _check_names(owner: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(known)}"
            raise TypeError(f"{owner}() has no argument {name!r}{meant}")


def configure(given: Mapping[str, Any]) -> tuple[EngineConfig, list[Choice]]:
    """A configuration of what is given, and of the environment for the rest; and the choices of that rest.

    A part that is given takes nothing from the environment. Raises ConfigError for a variable that means nothing.
    """
    settings = settings_of(EngineConfig)
    choices = choose(setting for setting in settings if setting.path[0] not in given)
    values = dict(given)
    for name, part in parts_of(EngineConfig).items():
        if given.get(name, part) is None:
            values[name] = part()
    return replace(build(EngineConfig, choices), **values), choices
