"""`hybrid perplexity`: how well a model foretells a text, to compare formats and models by."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from hybrid.commands.console import progress_bar, say, show, show_json
from hybrid.commands.flags import command, new_app, only
from hybrid.config import EngineConfig
from hybrid.errors import ConfigError
from hybrid.files import Reading, read_file
from hybrid.settings import check_settings, setting

if TYPE_CHECKING:
    from hybrid.serving.perplexity import Perplexity

app = new_app()

TEXTS = Reading(1 << 30, "give a text file")


@dataclass(frozen=True)
class PerplexityOptions:
    """How the text is cut, and how the result is printed."""

    COMMAND: ClassVar[str] = "perplexity"
    GROUP: ClassVar[str] = "prompts"

    window: int | None = setting(
        None, "Tokens read together.", minimum=2, shown="2048, or the model's context if that is shorter"
    )
    stride: int | None = setting(
        None, "Tokens from the beginning of one window to that of the next.", minimum=1, shown="half a window"
    )
    json: bool = setting(False, "Print one JSON object.", group="output")


@command(app)
def perplexity(
    file: Annotated[Path, typer.Argument(help="The text, in UTF-8.", metavar="FILE")],
    config: Annotated[
        EngineConfig,
        only(
            "model_path", "weight_format", "kv_format", "device", "threads", "numa", "load", "chunk_size", "cache_dir",
            "check",
        ),
    ],
    options: PerplexityOptions,
) -> None:  # fmt: skip
    """Tell how well a model foretells a text: perplexity, bits per token and bits per byte.

    The text is cut into windows. Every token but the first is scored once, in the first window that holds it, so from
    at least window minus stride tokens before it, except at the beginning of the text. Bits per byte compare models
    whose tokens differ. A small stride costs time: a window is computed for each.
    """
    check_settings(options)
    config = replace(config, max_seq_len=_window(config, options), max_batch=1)
    result = _measure(_read(file), config, options)
    if options.json:
        show_json(_report(result))
    else:
        show(_table(result))


def _window(config: EngineConfig, options: PerplexityOptions) -> int:
    """Raises ConfigError for one that is longer than the model's context, and for a stride that leaves out tokens."""
    from hybrid.models import model_spec
    from hybrid.plan.resolve import EMBEDDED_MODEL
    from hybrid.serving.perplexity import WINDOW
    from hybrid.weights.hub import with_local_model
    from hybrid.weights.pack import model_config

    path = with_local_model(config, only_config=True).model_path or EMBEDDED_MODEL
    limit = model_spec(model_config(path)).max_position
    window = min(WINDOW, limit) if options.window is None else options.window
    if window > limit:
        raise ConfigError(f"--window {window} is longer than the model's context of {limit} tokens; lower it")
    if options.stride is not None and options.stride >= window:
        raise ConfigError(f"--stride {options.stride} must be smaller than the window of {window} tokens; lower it")
    return window


def _read(file: Path) -> str:
    from hybrid.commands.prompts import decode_utf8

    text = decode_utf8(read_file(file, TEXTS), str(file))
    if not text:
        raise ConfigError(f"{file} is empty; {TEXTS.advice}")
    return text


def _measure(text: str, config: EngineConfig, options: PerplexityOptions) -> Perplexity:
    from hybrid.serving.llm import LLM

    with progress_bar() as progress, LLM.from_config(config, progress, say) as llm:
        return llm.perplexity(
            text, options.window, options.stride, lambda done, total: progress("windows", done, total)
        )


def _report(result: Perplexity) -> dict[str, Any]:
    shares = {name: getattr(result, name) for name in ("perplexity", "bits_per_token", "bits_per_byte")}
    return {**shares, **asdict(result)}


def _table(result: Perplexity) -> str:
    rows = [
        ("perplexity", f"{result.perplexity:.4f}"),
        ("bits per token", f"{result.bits_per_token:.4f}"),
        ("bits per byte", "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"),
        ("scored", f"{result.tokens} tokens, {result.bytes} bytes"),
        ("windows", f"{result.windows} of up to {result.window} tokens, stride {result.stride}"),
    ]
    return "\n".join(f"{name:<14}  {value}" for name, value in rows)
