"""What every command shares on the terminal: one line for an error, an exit code, a bar of progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

from hybrid.commands.signals import EXIT_INTERRUPTED, Handler, Terminated, end_at_once, ending_signals, raise_signal
from hybrid.errors import HybridError
from hybrid.printable import printable

if TYPE_CHECKING:
    import typer

EXIT_ERROR, EXIT_BROKEN_PIPE = 2, 141
FILES_WHOLE = "every file that was written is whole"
_LONGEST_ERROR = 1000  # characters
_STYLES = {"bold": "1", "dim": "2"}
_BAR = 30  # characters


def say(line: str) -> None:
    """A message on stderr; stdout is for results."""
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except OSError:  # nobody can be told, which is no reason to end otherwise
        _drop(2)


def show(text: str, end: str = "\n", dim: bool = False) -> None:
    """A result on stdout. A terminal gets it without control characters, a file or a pipe as it is."""
    if sys.stdout.isatty():
        text, end = (coloured(f"{printable(text)}{end}", "dim"), "") if dim else (printable(text), end)
    print(text, end=end, flush=True)


def show_json(value: Any, indent: int | None = None) -> None:
    """JSON on stdout, in ASCII where stdout cannot show all characters."""
    whole = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    show(json.dumps(value, ensure_ascii=not whole, indent=indent))


def coloured(text: str, style: str, editing: bool = False) -> str:
    """Text for a terminal, without colours where NO_COLOR asks for none. editing: for the prompt of a line editor,
    which must know what takes no room.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    begin, end = f"\033[{_STYLES[style]}m", "\033[0m"
    return f"\001{begin}\002{text}\001{end}\002" if editing else f"{begin}{text}{end}"


@contextmanager
def reading_bar() -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that draws on stderr how much of a prompt was read; gone when the context is left."""
    drawn = False

    def update(done: int, total: int) -> None:
        nonlocal drawn
        drawn = True
        full = done * _BAR // max(total, 1)
        bar = "#" * full + "-" * (_BAR - full)
        print(f"\r\033[Kprompt {done} of {total} [{bar}]", end="", file=sys.stderr, flush=True)

    try:
        yield update if sys.stderr.isatty() else lambda done, total: None
    finally:
        if drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def one_line(error: object) -> str:
    """The message of an error on one line, which is cut in its middle if it is very long."""
    text = " ".join(str(error).split())
    kept = _LONGEST_ERROR // 2
    return text if len(text) <= _LONGEST_ERROR else f"{text[:kept]} ... {text[-kept:]}"


def run_app(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process; a flag that it does not understand is one line, as any other error."""
    with starting():
        import typer

        # Typer gives no name of its own to the base of its errors.
        usage_error = cast("type[Exception]", typer.BadParameter.__mro__[1])
        try:
            code = app(args=arguments, prog_name=name, standalone_mode=False)
        except usage_error as error:
            reason = error.format_message()  # type: ignore[attr-defined]
            say(f"error: {one_line(reason).rstrip('.')}; {name} --help lists what is allowed")
            code = EXIT_ERROR
        raise SystemExit(code)


@contextmanager
def starting() -> Iterator[None]:
    """Around a program: errors as `exit_codes` has them, and signals end it at once unless a command handles them."""
    with exit_codes(handle=end_at_once):
        yield


@contextmanager
def exit_codes(interrupted: str = FILES_WHOLE, handle: Handler = raise_signal) -> Iterator[None]:
    """End the process as commands do: HybridError with 2, Ctrl-C and SIGTERM with 130, a reader that left with 141.
    handle: what a signal does.
    """
    _prepare_streams()
    try:
        with ending_signals(handle):
            yield
            sys.stdout.flush()
    except HybridError as error:
        say(f"error: {one_line(error)}")
        raise SystemExit(EXIT_ERROR) from None
    except (KeyboardInterrupt, Terminated):
        exec("")  # Python forgets a Ctrl-C that came while a text was executed; it would kill itself with it at the end
        say("\n" * sys.stderr.isatty() + f"interrupted; {interrupted}")  # a terminal shows ^C before it
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        _drop(1)
        raise SystemExit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        _drop(1)
        say(f"error: reading or writing failed: {one_line(error)}")
        raise SystemExit(EXIT_ERROR) from None


def _prepare_streams() -> None:
    """A stream that the shell closed goes nowhere; a character that the terminal cannot show becomes '?'."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  open until the process ends
        with suppress(AttributeError):  # replaced by something simpler
            getattr(sys, name).reconfigure(errors="replace")


def _drop(descriptor: int) -> None:
    """Drop buffered output, because at exit the interpreter would report that it cannot flush it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that draws on stderr, and does nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(escape(printable(what)), total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update
