"""What every command shares on the terminal: one line for an error, an exit code, a bar of progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hybrid.errors import HybridError

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141


def say(line: str) -> None:
    """One line on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """End the process as commands do: HybridError with 2, Ctrl-C with 130, a reader that left with 141."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # replaced by something simpler
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        yield
        sys.stdout.flush()
    except HybridError as error:
        say("error: " + " ".join(str(error).split()))
        raise SystemExit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        say("interrupted; every file that was written is whole")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes stdout
        raise SystemExit(EXIT_BROKEN_PIPE) from None


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that draws on stderr, and does nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update
