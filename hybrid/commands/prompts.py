"""Where the prompts of a run come from: flags, a file, or standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError
from hybrid.files import Reading, parse_json, read_file

DEFAULT_PROMPT = "Once upon a time"
MAX_PROMPTS = 1_000_000  # all of them are held in memory
PROMPTS = Reading(256 << 20, "give a text file with a prompt a line", prefix="--prompt-path")
KEYS = ("prompt", "text")  # of an object that holds a prompt
_LINES = (".jsonl", ".ndjson")
_NAMED = 'a list of texts or of objects with "prompt", alone or as {"prompts": [...]}'


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
    """A text file with a prompt a line, or JSON: a list of prompts, {"prompts": [...]}, or a JSON text a line.

    Blank lines and blank prompts do not count. Raises ConfigError.
    """
    text = decode_utf8(read_file(path, PROMPTS), PROMPTS.name(path)).replace("\r\n", "\n")
    found = _json_prompts(text, path)
    prompts = [prompt for prompt in (text.split("\n") if found is None else found) if prompt.strip()]
    if not prompts:
        raise ConfigError(f"--prompt-path {path} holds no prompt; write one on each line")
    if len(prompts) > MAX_PROMPTS:
        raise ConfigError(f"--prompt-path {path} holds {len(prompts)} prompts, {MAX_PROMPTS} are allowed; split it")
    return prompts


def read_stdin() -> str | None:
    """All of standard input as one prompt; None when it is a terminal, closed or blank."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    data = sys.stdin.buffer.read(PROMPTS.limit + 1)
    if len(data) > PROMPTS.limit:
        raise ConfigError(f"standard input is longer than the {PROMPTS.limit / 1e6:.0f} MB allowed; give less of it")
    text = decode_utf8(data, "standard input").replace("\r\n", "\n").rstrip("\n")
    return text if text.strip() else None


def decode_utf8(data: bytes, source: str) -> str:
    """A text without the byte order mark. Raises ConfigError naming the source."""
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save it as UTF-8"
        ) from None


def _json_prompts(text: str, path: Path) -> list[str] | None:
    """The prompts of JSON; None if neither the name of the file nor the whole of its text says that it is JSON.

    A line of text may begin with a brace or a bracket.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", *_LINES):
        return _maybe(text, path)
    if suffix == ".json" and (whole := _value(text, path)) is not None:
        return _prompts_of(whole, path)
    lines = [line for line in text.split("\n") if line.strip()]
    if suffix == ".json" and (len(lines) < 2 or _value(lines[0], path) is None):
        parse_json(text, path, PROMPTS)  # it is one text, and damaged: say where
    return [_line_prompt(line, number, path) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _maybe(text: str, path: Path) -> list[str] | None:
    if not text.lstrip().startswith(("{", "[")):
        return None
    value = _value(text, path)
    if isinstance(value, list) or (isinstance(value, dict) and "prompts" in value):
        return _prompts_of(value, path)
    values = [_value(line, path) for line in text.split("\n") if line.strip()]
    return [str(_prompt_of(v)) for v in values] if all(isinstance(v, dict) and _prompt_of(v) for v in values) else None


def _value(text: str, path: Path) -> Any:
    """None for what is no JSON."""
    try:
        return parse_json(text, path, PROMPTS)
    except ConfigError:
        return None


def _prompts_of(value: Any, path: Path) -> list[str]:
    listed = value.get("prompts") if isinstance(value, dict) else value
    prompts = [_prompt_of(entry) for entry in listed] if isinstance(listed, list) else [None]
    if None in prompts:
        raise ConfigError(f"--prompt-path {path} is JSON that holds no prompts; it must be {_NAMED}")
    return [prompt for prompt in prompts if prompt is not None]


def _line_prompt(line: str, number: int, path: Path) -> str:
    try:
        prompt = _prompt_of(parse_json(line, path, PROMPTS))
    except ConfigError as error:
        raise ConfigError(f"line {number} of {error}") from None
    if prompt is None:
        raise ConfigError(
            f'--prompt-path {path}: line {number} holds no prompt; it must be a text, or an object with "prompt"'
        )
    return prompt


def _prompt_of(entry: Any) -> str | None:
    """A text, or that of an object."""
    if isinstance(entry, dict):
        entry = next((entry[key] for key in KEYS if key in entry), None)
    return entry if isinstance(entry, str) else None
