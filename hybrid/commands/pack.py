"""`hybrid pack`: make the packed store of a checkpoint, beforehand or elsewhere than in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hybrid.commands.console import exit_codes, progress_bar, say, show
from hybrid.commands.flags import command, new_app
from hybrid.formats.mix import MIXES, PARTS
from hybrid.settings import required, setting

app = new_app()

_FORMAT_HELP = (
    f"Weight formats: auto (as published), {', '.join(MIXES)}; then, after commas, those of single parts: "
    f"int4,head=int8 (parts: {', '.join(PARTS)})."
)


@dataclass(frozen=True)
class PackOptions:
    """From where, to where, and in which formats."""

    COMMAND: ClassVar[str] = "pack"
    GROUP: ClassVar[str] = "model"

    input_path: Path = required(
        "The model: a directory with config.json and safetensors, a GGUF file, or org/name.", metavar="DIR"
    )
    output_path: Path = required("The store, new or empty.", metavar="DIR")
    hf: bool = setting(False, "The input is a Hugging Face directory (always so).")
    format: str = setting("auto", _FORMAT_HELP, metavar="MIX")
    check: bool = setting(False, "Refuse weights with NaN or infinity.")
    force: bool = setting(False, "Replace the store that is there.")


@command(app)
def pack(options: PackOptions) -> None:
    """Pack a model once, so that every later start maps it. An interrupted run is resumed by the next one."""
    with exit_codes(interrupted=f"{options.output_path} is no store yet, the same command resumes it"):
        packed = _pack(options)
        show(f"{options.output_path}: packed" if packed else f"{options.output_path}: already complete, nothing to do")


def _pack(options: PackOptions) -> bool:
    """Whether there was anything to do."""
    from hybrid.formats.mix import parse_mix
    from hybrid.weights.checkpoints.opening import open_checkpoint
    from hybrid.weights.hub import local_model
    from hybrid.weights.pack import pack

    with progress_bar() as progress:
        checkpoint = open_checkpoint(local_model(options.input_path, progress))
        mix = parse_mix(options.format, checkpoint.native)
        return pack(checkpoint, options.output_path, mix, progress, options.check, options.force, say)
