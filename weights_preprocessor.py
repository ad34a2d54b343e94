"""Pack a Hugging Face checkpoint into a store that loads at once: a thin command over `hybrid.weights`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hybrid.errors import HybridError


def main(
    input_path: Annotated[Path, typer.Option(help="Directory of the model: config.json and safetensors.")],
    output_path: Annotated[Path, typer.Option(help="Directory of the store, new or empty.")],
    hf: Annotated[bool, typer.Option("--hf", help="The input is a Hugging Face directory (always so).")] = False,
    format: Annotated[str, typer.Option(help="Weight format of the store.")] = "bf16",
    check: Annotated[bool, typer.Option("--check", help="Refuse weights with NaN or infinity.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the store that is there.")] = False,
) -> None:
    """Pack a model once, so that every later start maps it. An interrupted run is resumed by the next one."""
    try:
        _pack(input_path, output_path, format, check, force)
    except HybridError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {output_path} is no store yet; the same command resumes it", err=True)
        raise typer.Exit(130) from None


def _pack(source: Path, output: Path, format: str, check: bool, force: bool) -> None:
    from hybrid.weights.checkpoint import Checkpoint
    from hybrid.weights.pack import pack

    checkpoint = Checkpoint.open(source)
    with _progress_bar() as progress:
        packed = pack(checkpoint, output, format, progress, check, force, lambda line: typer.echo(line, err=True))
    typer.echo(f"{output}: packed" if packed else f"{output}: already complete, nothing to do")


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        SpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("packing", total=None, visible=False)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total, visible=True)


if __name__ == "__main__":
    typer.run(main)
