"""`hybrid experiment`: caches, policies and machines compared as a file says, resumable, with a report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from hybrid.commands.console import progress_bar, say, show
from hybrid.commands.flags import command, new_app, parse_path
from hybrid.commands.new_file import write_new
from hybrid.commands.tables import markdown
from hybrid.settings import check_settings, setting

app = new_app()

_PATH: dict[str, Any] = {"parser": parse_path}
File = Annotated[Path, typer.Argument(help="The experiment, a TOML file.", metavar="FILE", **_PATH)]


@dataclass(frozen=True)
class FolderOptions:
    """Where results are."""

    COMMAND: ClassVar[str] = "experiment"
    GROUP: ClassVar[str] = "files"

    folder: Path | None = setting(None, "Where results are kept.", shown="FILE without its suffix")


@dataclass(frozen=True)
class WorkOptions:
    """How replays are run."""

    COMMAND: ClassVar[str] = "experiment"
    GROUP: ClassVar[str] = "output"

    workers: int | None = setting(None, "Processes.", minimum=1, shown="one for each processor")


@command(app)
def new(file: File) -> None:
    """Write an experiment to begin with, to be changed. A file that is there is left alone."""
    from hybrid.lab.html import ASSETS

    write_new(file, (ASSETS / "experiment.toml").read_bytes(), ".toml", "an experiment is a TOML file")
    say(f"{file}: change it, then `hybrid experiment run {file}`")


@command(app, "what was replayed is kept, and is not replayed again")
def run(file: File, where: FolderOptions, work: WorkOptions) -> None:
    """Replay what is not done yet.

    Results are kept as they come, by what they depend on: traces, caches, costs and code. After an interruption, or a
    change of the file, only what is new is replayed.
    """
    from hybrid import lab

    check_settings(work)
    experiment = lab.load(file)
    with progress_bar() as progress:
        workers = work.workers or len(os.sched_getaffinity(0))
        replays = lab.run(experiment, where.folder, workers, progress)
    say(
        f"{len(replays)} replays are in {where.folder or experiment.folder}; `hybrid experiment report` writes a report"
    )


@command(app)
def status(file: File, where: FolderOptions) -> None:
    """Say how many replays of every trace are done."""
    from hybrid import lab

    rows = [[one.name, str(one.done), str(one.total)] for one in lab.status(lab.load(file), where.folder)]
    show("\n".join(markdown(["trace", "done", "of"], rows, [True, False, False])))


@command(app)
def report(file: File, where: FolderOptions) -> None:
    """Write the report of an experiment that was run: an HTML page, CSV and figures beside it."""
    from hybrid import lab

    show(str(lab.report(lab.load(file), where.folder)))
