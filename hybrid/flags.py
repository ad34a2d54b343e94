"""The flags of the commands: name, type and help of each; their defaults are those of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.config import CACHE_POLICIES, DEVICES, WEIGHT_FORMATS


def _flag(name: str, text: str, **more: Any) -> Any:
    return typer.Option(name, help=text, **more)


def _repeated(name: str, text: str) -> Any:
    return _flag(name, f"{text}; may be given several times.", show_default=False, metavar="TEXT")


def _print_version(wanted: bool) -> None:
    if wanted:
        import hybrid

        print(f"hybrid {hybrid.__version__}")
        raise typer.Exit


_AUTO = {"show_default": "chosen for the machine"}
ModelPath = Annotated[Path | None, _flag("--model-path", "Model directory.", show_default="embedded model")]
Prompts = Annotated[list[str], _repeated("--prompt", "A prompt")]
PromptPath = Annotated[Path | None, _flag("--prompt-path", 'Text file, a prompt a line, or JSON {"prompts": []}.')]
PromptCount = Annotated[int | None, _flag("--n-prompts", "Repeat or cut the list of prompts to this many.")]
Chat = Annotated[bool, _flag("--chat", "Prompts are questions: apply the chat template.")]
HideResponse = Annotated[bool, _flag("--hide-resp", "Do not print the text.")]
Json = Annotated[bool, _flag("--json", "Print one JSON object instead of text and summary.")]
DryRun = Annotated[bool, _flag("--dry-run", "Print the plan of memory and threads, load nothing.")]
BreakdownCsv = Annotated[Path | None, _flag("--breakdown-csv", "Write the times of every step, in ms.")]
CachehitCsv = Annotated[Path | None, _flag("--cachehit-csv", "Write the hits of the expert cache.")]
Version = Annotated[
    bool,
    _flag("--version", "Print the version.", callback=_print_version, is_eager=True, show_default=False),
]
MaxTokens = Annotated[int, _flag("--max-tokens", "Tokens to generate at most, for each prompt.")]
Temperature = Annotated[float, _flag("--temperature", "0 is greedy.")]
TopP = Annotated[float, _flag("--top-p", "Keep the likeliest tokens that reach this probability.")]
TopK = Annotated[int, _flag("--top-k", "Keep this many of the likeliest tokens; 0 keeps all.")]
MinP = Annotated[float, _flag("--min-p", "Keep tokens this likely, relative to the likeliest.")]
RepetitionPenalty = Annotated[float, _flag("--repetition-penalty", "Above 1 avoids tokens seen before.")]
Seed = Annotated[int | None, _flag("--seed", "Makes sampling repeatable.")]
Stop = Annotated[list[str], _repeated("--stop", "End before this text")]
IgnoreEos = Annotated[bool, _flag("--ignore-eos", "Go on after the end of the text.")]
Device = Annotated[str, _flag("--device", f"One of {', '.join(DEVICES)}.")]
Format = Annotated[str, _flag("--format", f"Of the weights: one of {', '.join(WEIGHT_FORMATS)}.")]
Threads = Annotated[int | None, _flag("--threads", "Threads that compute.", **_AUTO)]
MaxSeqLen = Annotated[int | None, _flag("--max-seq-len", "Tokens of one sequence at most.", **_AUTO)]
MaxBatch = Annotated[int, _flag("--max-batch", "Sequences that run together.")]
ChunkSize = Annotated[int, _flag("--chunk-size", "Rows of one step at most.")]
CacheDir = Annotated[Path | None, _flag("--cache-dir", "Where packed models are kept.", show_default="user cache")]
Check = Annotated[bool, _flag("--check", "Verify every weight while loading.")]
CacheBlocks = Annotated[int | None, _flag("--cache-nblocks", "Indexes of the expert cache.")]
CacheWays = Annotated[int | None, _flag("--cache-nways", "Experts that each index holds.")]
CacheQuota = Annotated[int | None, _flag("--cache-quota", "Experts copied in one step at most.")]
CachePolicy = Annotated[str, _flag("--cache-replace-policy", f"One of {', '.join(CACHE_POLICIES)}.")]
