"""Flags from the declarations of settings (`hybrid.settings`), and commands that get their values as dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from hybrid.commands.console import FILES_WHOLE, exit_codes
from hybrid.commands.environment import warn_of_unknown_variables
from hybrid.settings import Choice, Setting, as_utf8, build, choose, named_as_given, parse_numbers, settings_of

GROUPS = {
    "model": "Model",
    "prompts": "Prompts",
    "chat": "Chat",
    "server": "Server",
    "cluster": "Replicas",
    "sampling": "Sampling",
    "engine": "Engine",
    "cache": "Expert cache",
    "gpu": "GPU",
    "device": "Simulated device",
    "traces": "Traces",
    "caches": "Caches to replay",
    "rates": "Rates of the machine, for predicted speeds",
    "files": "Files",
    "output": "Output",
    "": "Others",
}  # in --help, in this order


def new_app() -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Only:
    """These settings of a dataclass alone; `defaults` has those whose default is another."""

    names: tuple[str, ...]
    defaults: Mapping[str, Any]


def only(*names: str, **defaults: Any) -> Only:
    """For `Annotated[EngineConfig, only("threads", device="cpu")]`: a command that has few of the flags."""
    return Only(names, defaults)


def command(app: typer.Typer, interrupted: str = FILES_WHOLE) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command of an application. interrupted: what `exit_codes` says after Ctrl-C.

    Each of its parameters that is a dataclass of settings becomes their flags; the others are typer's own.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        wanted, others = _parameters_of(body)
        order = list(GROUPS)
        settings = sorted((s for part in wanted.values() for s in part.settings), key=lambda s: order.index(s.group))

        def call(context: typer.Context, print_config: bool, **given: Any) -> None:
            with exit_codes(interrupted):
                warn_of_unknown_variables(settings)
                choices = choose(settings, _said(context, given))
                _require(context, choices)
                with named_as_given(choices):
                    values = {name: build(part.kind, choices) for name, part in wanted.items()}
                    if print_config:
                        from hybrid.commands.print_config import print_choices

                        return print_choices(choices, values.values())
                    body(**values, **{other.name: given[other.name] for other in others})

        flags = [_parameter(setting) for setting in settings if setting.flag]
        call.__signature__ = inspect.Signature([_CONTEXT, *flags, *others, _PRINT_CONFIG])  # type: ignore[attr-defined]
        call.__annotations__, call.__name__, call.__doc__ = {}, body.__name__, body.__doc__
        app.command(cls=type("Grouped", (Grouped,), {"groups": {s.name: s.group for s in settings}}))(call)
        return body

    return register


class Grouped(TyperCommand):
    """A command whose help has a section for each group of flags."""

    groups: ClassVar[Mapping[str, str]] = {}  # by the name of a setting

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            if (line := parameter.get_help_record(ctx)) is not None:
                sections[self.groups.get(parameter.name or "", "")].append(line)
        for group, lines in sections.items():
            if lines:
                with formatter.section(GROUPS[group]):
                    formatter.write_dl(lines)


@dataclass(frozen=True)
class _Part:
    """A parameter of a command that is a dataclass, and the settings of it that the command has."""

    kind: type[Any]
    settings: tuple[Setting, ...]


def _parameters_of(body: Callable[..., None]) -> tuple[dict[str, _Part], list[inspect.Parameter]]:
    """Those that are dataclasses of settings, by name, and the others."""
    parts: dict[str, _Part] = {}
    others = []
    hints = get_type_hints(body, include_extras=True)
    for name, parameter in inspect.signature(body).parameters.items():
        kind, *words = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        if is_dataclass(kind):
            few = next((word for word in words if isinstance(word, Only)), None)
            parts[name] = _Part(kind, _chosen(kind, few))  # type: ignore[arg-type]
        else:
            others.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
    return parts, others


def _chosen(kind: type, few: Only | None) -> tuple[Setting, ...]:
    """The settings of a dataclass that a command has; a part is named as its field."""
    settings = settings_of(kind)
    if few is None:
        return settings
    if unknown := {*few.names, *few.defaults} - {setting.path[0] for setting in settings}:
        raise TypeError(f"{kind.__name__} has no setting {', '.join(sorted(unknown))}")
    return tuple(
        replace(setting, default=few.defaults.get(setting.path[0], setting.default))
        for setting in settings
        if setting.path[0] in (*few.names, *few.defaults)
    )


def _said(context: typer.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of flags that were given, not those of defaults."""
    sources = {name: context.get_parameter_source(name) for name in given}
    return {name: as_utf8(given[name]) for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _require(context: typer.Context, choices: Sequence[Choice]) -> None:
    for choice in choices:
        if choice.value is MISSING:
            context.fail(f"Missing option '{choice.setting.option}'.")


def _parameter(setting: Setting) -> inspect.Parameter:
    """A setting as typer reads it."""
    option = f"{setting.option}/--no-{setting.option[2:]}" if setting.negatable else setting.option
    names = [option, setting.short] if setting.short else [option]
    help, default, hint, more = setting.help, setting.default, setting.hint, _typing(setting)
    if setting.shown:
        more["show_default"] = setting.shown
    if setting.metavar:
        more["metavar"] = setting.metavar
    if setting.kind is tuple:
        help, default, hint = f"{help}; may be given several times.", list(default), list[setting.item]  # type: ignore[name-defined]
    elif setting.kind is Mapping:
        default, hint = None, Any
    elif setting.words:
        hint = Any  # typer knows no union
    if default is MISSING:  # a variable may have it, so that typer cannot know
        help, default, hint = f"{help}  [required]", None, hint | None
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[hint, typer.Option(*names, help=help, **more)],
        default=default,
    )


def _typing(setting: Setting) -> dict[str, Any]:
    """How typer reads and shows a value of this type."""
    if setting.words:
        return {"parser": lambda text: text if text in setting.words else parse_whole(text), "metavar": "INTEGER"}
    kinds: dict[type, dict[str, Any]] = {
        int: {"parser": parse_whole, "metavar": "INTEGER"},
        float: {"parser": parse_real, "metavar": "NUMBER"},
        Path: {"parser": parse_path, "metavar": "PATH"},
        str: {"metavar": "TEXT"},
        tuple: {"show_default": False, "metavar": "INTEGER" if setting.item is int else "TEXT"},
        Mapping: {"parser": _parse_table, "show_default": False, "metavar": "JSON"},
    }
    return dict(kinds.get(setting.kind, {}))


def parse_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r:.80} is not a whole number") from None


def parse_real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r:.80} is not a number") from None


def _parse_table(text: str) -> dict[int, float]:
    try:
        return parse_numbers(text)
    except ValueError:
        raise typer.BadParameter(f'{text!r:.80} is not a JSON object such as {{"15": -100}}') from None


def parse_path(text: str) -> Path:
    """`--flag=~/x` reaches a command with its tilde; an empty path is a variable of the shell that is not set."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise typer.BadParameter(f"{text!r} names a home directory that is not known; write the whole path") from None
    if not str(text):
        raise typer.BadParameter("it is empty; give a path")
    return path


def _print_version(wanted: bool) -> None:
    if wanted:
        import hybrid

        print(f"hybrid {hybrid.__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True, show_default=False),
]
_CONTEXT = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
_PRINT_CONFIG = inspect.Parameter(
    "print_config",
    inspect.Parameter.KEYWORD_ONLY,
    annotation=Annotated[
        bool, typer.Option("--print-config", help="Print every setting and where it came from, load nothing.")
    ],
    default=False,
)
