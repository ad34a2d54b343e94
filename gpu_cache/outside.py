"""Classes that a user brings: of a file, as `my_policy.py:MyPolicy`, or of a package that names an entry point."""

from __future__ import annotations

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from gpu_cache.errors import CacheError, first_line

T = TypeVar("T")
_MAX_BYTES = 1 << 20
_MODULE = "hybrid_outside_"  # begins the name of a module that was made of a file


def is_file(name: str) -> bool:
    """Whether a name means a file, with or without a class: no name of ours has a colon or ends like this."""
    return ":" in name or name.endswith(".py")


def class_of_file(name: str, *bases: type[T]) -> type[T]:
    """The class that `FILE.py:CLASS` names, a subclass of one of these; `FILE.py` does if the file has only one. Runs
    the file.

    The same content is run once in a process. Raises CacheError that names the file, the line and what is wrong.
    """
    path, wanted = _split(name)
    module = _module(path)
    own = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    fitting = {value.__name__: value for value in own if issubclass(value, bases)}
    if not wanted and len(fitting) == 1:
        return next(iter(fitting.values()))
    if wanted in fitting:
        return fitting[wanted]
    kind = " or ".join(map(_kind, bases))
    if found := next((value for value in own if value.__name__ == wanted), None):
        raise CacheError(f"{path} line {line_of(found)}: {wanted} is not {kind}; make it a subclass")
    names = ", ".join(fitting) or "none"
    raise CacheError(
        f"{path}: has no class {wanted or 'of its own'} that is {kind}; it has {names}: name one, FILE:CLASS"
    )


def entry_names(group: str) -> list[str]:
    """The names under which installed packages offer classes."""
    return sorted({entry.name for entry in entry_points(group=group)})


def class_of_entry(name: str, group: str, base: type[T]) -> type[T]:
    """The class that an installed package offers under a name of `entry_names`. Raises CacheError."""
    (entry, *_) = entry_points(group=group, name=name)
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:
        raise CacheError(f"{group} {name!r} ({entry.value}) cannot be imported: {_told(error)}") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise CacheError(f"{group} {name!r} ({entry.value}) is not {_kind(base)}")
    return found


def make_outside(kind: type[T], rule: str, **given: Any) -> T:
    """An object of a user's class. rule: what it is made from, for the CacheError that its own errors become."""
    try:
        return kind(*given.values())
    except CacheError:
        raise
    except Exception as error:
        raise CacheError(
            f"{place_of(kind)}: {kind.__name__}({', '.join(given)}) failed: {_told(error)}; {rule}"
        ) from None


def check_answers(made: Any, name: str, check: Callable[[Any], T]) -> None:
    """What a method of an object answers goes through `check`, which returns it as it is used, or raises TypeError or
    ValueError that says what is wrong with it: a CacheError that names file and line.
    """
    answer, where = getattr(made, name), place_of(getattr(made, name))

    def checked(*given: Any) -> T:
        found = answer(*given)
        try:
            return check(found)
        except (TypeError, ValueError) as error:
            raise CacheError(f"{where}: {name} returned {first_line(repr(found)):.80}; {error}") from None

    checked.__wrapped__ = answer  # type: ignore[attr-defined]
    setattr(made, name, checked)


def guard(made: Any, hooks: Iterable[str]) -> None:
    """Errors in these methods of an object become a CacheError that names file and line."""
    for name in hooks:
        setattr(made, name, _guarded(made, name, getattr(made, name)))


def line_of(thing: Any) -> int:
    """The line where a class or function begins; 1 if that cannot be told."""
    try:
        return inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return 1


def place_of(method: Any) -> str:
    """The file and the line where a method begins, for errors."""
    function = inspect.unwrap(method)
    return f"{inspect.getsourcefile(function) or 'policy'} line {line_of(function)}"


def _kind(base: type) -> str:
    return f"{'an' if base.__name__[0] in 'AEIOU' else 'a'} {base.__name__} of {base.__module__}"


def _guarded(made: Any, name: str, method: Any) -> Any:
    def call(*given: Any) -> Any:
        try:
            return method(*given)
        except CacheError:
            raise
        except Exception as error:
            raise CacheError(
                f"{_where(error, made)}: {name} of {type(made).__name__} failed: {_told(error)}; "
                "a hook takes whatever its base says and never raises"
            ) from None

    call.__wrapped__ = method  # type: ignore[attr-defined]
    return call


def _split(name: str) -> tuple[Path, str]:
    path, colon, wanted = name.rpartition(":")
    if not colon or wanted.endswith(".py"):
        path, wanted = name, ""
    return Path(path).expanduser(), wanted


def _module(path: Path) -> ModuleType:
    try:
        if not path.is_file():
            raise CacheError(f"{path}: is no file; give FILE.py:CLASS")
        with path.open("rb") as file:
            source = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(f"{path}: cannot be read ({first_line(error)}); give FILE.py:CLASS") from None
    if len(source) > _MAX_BYTES:
        raise CacheError(f"{path}: is larger than {_MAX_BYTES} bytes, which no policy is; give FILE.py:CLASS")
    name = _MODULE + hashlib.sha256(bytes(path.resolve()) + b"\0" + source).hexdigest()[:16]
    if name not in sys.modules:
        sys.modules[name] = module = ModuleType(name)  # known while it runs: dataclasses look there
        module.__file__ = str(path.resolve())
        try:
            exec(compile(source, module.__file__, "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            line = error.lineno if isinstance(error, SyntaxError) else _last_line(error, module.__file__)
            raise CacheError(f"{path} line {line or 1}: {_told(error)}; the file must import by itself") from None
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _last_line(error: BaseException, file: str) -> int | None:
    """The innermost line of this file that an error passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def _where(error: BaseException, made: Any) -> str:
    file = inspect.getsourcefile(type(made)) or "policy"
    return f"{file} line {_last_line(error, file) or line_of(type(made))}"


def _told(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else first_line(error)
    name = type(error).__name__
    return name if text == name else f"{name}: {text}"
