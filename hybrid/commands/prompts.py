"""Where the prompts of a run come from: flags, a file, or standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError

DEFAULT_PROMPT = "Once upon a time"
MAX_PROMPTS = 1_000_000  # all of them are held in memory


def gather_prompts(given: Sequence[str], path: Path | None, count: int | None) -> list[str]:
    """The prompts of `--prompt` or of `--prompt-path`, repeated or cut to `count`; empty when there are none.

    Raises ConfigError.
    """
    if given and path:
        raise ConfigError("--prompt and --prompt-path exclude each other; give one of them")
    if count is not None and not 1 <= count <= MAX_PROMPTS:
        raise ConfigError(f"--n-prompts {count} is out of range; it must be from 1 to {MAX_PROMPTS}")
    prompts = read_prompts(path) if path else list(given)
    return list(islice(cycle(prompts), count)) if count else prompts


def read_prompts(path: Path) -> list[str]:
    """A text file with one prompt a line (blank lines do not count), or JSON {"prompts": [...]}."""
    try:
        text = _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"--prompt-path {path} cannot be read ({error.strerror}); give a text file") from None
    prompts = _json_prompts(text, path) if _is_json(text, path) else text.replace("\r\n", "\n").split("\n")
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ConfigError(f"--prompt-path {path} holds no prompt; write one on each line")
    return prompts


def read_stdin() -> str | None:
    """All of standard input as one prompt; None when it is a terminal, closed or blank."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    text = _decode(sys.stdin.buffer.read(), "standard input").rstrip("\n")
    return text if text.strip() else None


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save it as UTF-8"
        ) from None


def _is_json(text: str, path: Path) -> bool:
    """By its name, or because the whole of it is such an object: a prompt may begin with a brace."""
    if path.suffix.lower() == ".json":
        return True
    try:
        return text.lstrip().startswith("{") and "prompts" in json.loads(text)
    except (ValueError, RecursionError):
        return False


def _json_prompts(text: str, path: Path) -> list[str]:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--prompt-path {path} is not valid JSON ({error}); correct it") from None
    prompts = value.get("prompts") if isinstance(value, dict) else None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f'--prompt-path {path} must hold {{"prompts": [...]}} with a list of texts')
    return prompts
