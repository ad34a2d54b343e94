"""Pack a Hugging Face checkpoint into a store that loads at once: a thin command over `hybrid.weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.commands.console import exit_codes, progress_bar, run_app, say, show
from hybrid.commands.flags import parse_path

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


_FORMAT_HELP = (
    "Weight formats: auto (as published), bf16, int8, int4, fp8, mxfp4; then, after commas, those of single parts: "
    "int4,head=int8 (parts: experts, shared, dense, attention, head)."
)


def _directory(text: str) -> Any:
    return typer.Option(help=text, parser=parse_path, metavar="DIR")


@app.command()
def main(
    input_path: Annotated[Path, _directory("The model: config.json and safetensors.")],
    output_path: Annotated[Path, _directory("The store, new or empty.")],
    hf: Annotated[bool, typer.Option("--hf", help="The input is a Hugging Face directory (always so).")] = False,
    format: Annotated[str, typer.Option(help=_FORMAT_HELP, metavar="MIX")] = "auto",
    check: Annotated[bool, typer.Option("--check", help="Refuse weights with NaN or infinity.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the store that is there.")] = False,
) -> None:
    """Pack a model once, so that every later start maps it. An interrupted run is resumed by the next one."""
    with exit_codes(interrupted=f"{output_path} is no store yet, the same command resumes it"):
        packed = _pack(input_path, output_path, format, check, force)
        show(f"{output_path}: packed" if packed else f"{output_path}: already complete, nothing to do")


def _pack(source: Path, output: Path, format: str, check: bool, force: bool) -> bool:
    from hybrid.formats.mix import parse_mix
    from hybrid.weights.checkpoints.huggingface import Checkpoint
    from hybrid.weights.pack import pack

    checkpoint = Checkpoint.open(source)
    mix = parse_mix(format, checkpoint.native)
    with progress_bar() as progress:
        return pack(checkpoint, output, mix, progress, check, force, say)


if __name__ == "__main__":
    run_app(app, "weights_preprocessor.py")
