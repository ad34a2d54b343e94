"""Any checkpoint: a directory with safetensors, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrid.files.gguf import is_gguf
from hybrid.formats.mix import FormatMix
from hybrid.weights.checkpoints.gguf import GgufCheckpoint, describe_gguf
from hybrid.weights.checkpoints.huggingface import Checkpoint, describe_huggingface


def open_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself. Raises `ConfigError` and `WeightsError`; see also `Checkpoint.check`."""
    return GgufCheckpoint.open(path) if is_gguf(path) else Checkpoint.open(path)


def describe_checkpoint(path: Path) -> tuple[dict[str, Any], FormatMix]:
    """The contents of its config.json, or what it would be, and the formats in which it is published."""
    return describe_gguf(path) if is_gguf(path) else describe_huggingface(path)
